"""The description that lies beside a personal model: how to load and feed it in plain torch."""

from __future__ import annotations

from typing import Any

from client_app.data import ClientData
from common.wire import Evaluation


def describe(model_name: str, data: ClientData, evaluation: Evaluation) -> dict[str, Any]:
    """Return what a person or program needs to use the stored weights, as JSON-able facts."""
    build = (
        f"{model_name.partition(':')[0]} import {model_name.partition(':')[2]} as factory; "
        if ":" in model_name
        else "client_app.models.registry import build_model; "
    )
    call = "factory(" if ":" in model_name else f"build_model('{model_name}', "
    return {
        "model": model_name,
        "in_channels": data.in_channels,
        "num_classes": data.num_classes,
        "image_size": int(data.test_images.shape[-1]),
        "mean": [float(x) for x in data.mean],
        "std": [float(x) for x in data.std],
        "input": "images / 255, minus mean, divided by std, per channel; float32 (B, C, H, W)",
        "num_test": evaluation.num_test,
        "test_accuracy": evaluation.num_correct / evaluation.num_test,
        "load": (
            f"from {build}from safetensors.torch import load_file; "
            f"model = {call}in_channels={data.in_channels}, num_classes={data.num_classes}); "
            "model.load_state_dict(load_file('personal_model.safetensors')); model.eval()"
        ),
    }
