"""Makes schedulers.json: grids and multistep solvers of diffusers' schedulers.

    pip install 'tmdjax[parity]' && python tests/goldens/make_schedulers.py

Grids are the sigmas of FlowMatchEulerDiscreteScheduler as the pipelines set them. A
solver's states are those after each step on the velocity below, with and without
guidance, at the exact time of each step (diffusers rounds what a network is told).
"""

import json
import pathlib

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

FLUX = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
QWEN = dict(
    use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
    shift_terminal=0.02,
)  # fmt: skip
# Scheduler, steps, tokens of a resolution-dependent shift.
GRIDS = {
    "sd3_28": (dict(shift=3.0), 28, None),
    "sd3_10": (dict(shift=3.0), 10, None),
    "flux_dev_512": (FLUX, 28, 1024),
    "flux_dev_1024": (FLUX, 50, 4096),
    "flux_schnell": (dict(shift=1.0), 4, 0),
    "qwen_image": (QWEN, 20, 6032),
}
SOLVERS = {
    "dpmpp_2m": (DPMSolverMultistepScheduler, (6, 20)),
    "unipc": (UniPCMultistepScheduler, (6, 20)),
}
START = [[-1.5, 0.2, 0.9], [0.4, 2.1, -0.3]]
GUIDANCE = 2.5


def velocity(x, t, shift):
    return (1.3 - t) * torch.tanh(2 * x - shift) + t * (x - shift) + 0.1 * x


def grid(options, steps, tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    given = {"num_inference_steps": steps}
    if tokens is not None:  # the pipelines of FLUX and of Qwen-Image
        given = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    if tokens:
        low, high = (
            scheduler.config.base_image_seq_len,
            scheduler.config.max_image_seq_len,
        )
        base, most = scheduler.config.base_shift, scheduler.config.max_shift
        given["mu"] = base + (most - base) / (high - low) * (tokens - low)
    scheduler.set_timesteps(**given)
    return scheduler.sigmas.tolist()


def walk(kind, steps, guided):
    scheduler = kind(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    x, states = torch.tensor(START), []
    for step, t in enumerate(scheduler.timesteps):
        at = scheduler.sigmas[step]
        v = velocity(x, at, 0.5)
        if guided:
            null = velocity(x, at, 0.0)
            v = null + GUIDANCE * (v - null)
        x = scheduler.step(v, t, x).prev_sample
        states.append(x.tolist())
    return {"grid": scheduler.sigmas.tolist(), "states": states}


if __name__ == "__main__":
    made = {
        "grids": {name: grid(*case) for name, case in GRIDS.items()},
        "start": START,
        "guidance": GUIDANCE,
        "solvers": {
            f"{name} {steps} {'guided' if guided else 'plain'}": walk(
                kind, steps, guided
            )
            for name, (kind, counts) in SOLVERS.items()
            for steps in counts
            for guided in (False, True)
        },
    }
    text = json.dumps(
        json.loads(json.dumps(made), parse_float=lambda x: float(f"{float(x):.7g}"))
    )
    text = text.replace('], "', '],\n"').replace('}, "', '},\n"')
    pathlib.Path(__file__).with_name("schedulers.json").write_text(text + "\n")
