"""Reports: tables, plots and one HTML page, drawn from the records alone. Imports no torch."""
