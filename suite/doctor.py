"""What `seqbench doctor` finds: the environment, the backends' refusals, forward = step."""

from __future__ import annotations

import torch

from seqbench.suite.environment import commit, cores, environment

TOLERANCE = 1e-4  # float32, summed in another order


def examine() -> dict[str, dict[str, str]]:
    """Findings by title; a value with FAILED in it is a fault."""
    from seqbench.kernels import dispatch, tuning
    from seqbench.models.build import presets

    found = environment(torch.device("cpu"), {})
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "environment": {
            "python": found["python"],
            **found["versions"],
            "platform": found["platform"],
            "processor": found["processor"],
            "cores": str(cores()),
            "gpu": gpu,
            "commit": f"{commit()[0]}{' with changes' if commit()[1] else ''}",
        },
        "kernel backends": {
            name: f"refuses: {reason}" if reason else "available"
            for name, reason in dispatch.backends().items()
        },
        "kernel tuning": {
            "state": "on" if tuning.enabled() else "off; SEQBENCH_AUTOTUNE=1 turns it on",
            "kept in": str(tuning.kept_in()),
            **{case: str(choice) for case, choice in tuning.kept().items()},
        },
        "forward = step": {name: _forward_is_step(name) for name in presets()},
    }


@torch.no_grad()
def _forward_is_step(name: str) -> str:
    from seqbench.models.build import build_model

    torch.manual_seed(0)
    model = build_model(name, vocab_size=11, d_model=32, num_layers=2).eval()
    tokens = torch.randint(11, (2, max(12, model.full_length)))  # a U-Net's centre speaks late
    whole = model(tokens)
    state = model.initial_state(2)
    steps = []
    for t in range(tokens.shape[1]):
        logits, state = model.step(tokens[:, t], state)
        steps.append(logits)
    error = (torch.stack(steps, 1) - whole).abs().max().item()
    return f"{'ok' if error < TOLERANCE else 'FAILED'}, largest difference {error:.1e}"
