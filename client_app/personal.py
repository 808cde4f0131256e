"""What a participant owns at the end: its personal model, usable without this project.

`personal_model.safetensors` is the plain torch state_dict, `personal_model.json` says how it is
fed and what it reached, `test_rows.npy` which examples of the participant's own source that was
measured on. Where it is a predictor of two models, `own_model.safetensors` and
`common_model.safetensors` are their plain state_dicts, and its own has both and the weight.

A participant with a state folder also gets `personal_model.pt2`: the whole program (torch.export),
uint8 pictures in and logits out, of two models log-probabilities, which runs where only torch is
installed. As it is written here it has raw weights and JSON, no pickled code; torch loads what is
pickled in one that somebody else wrote, which is why no `.pt2` is ever read, or handed on.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from client_app.data.examples import ClientData
from client_app.frozen import FROZEN, frozen_of, frozen_state, link_frozen
from client_app.models.building import build_for
from client_app.predictor import Predictor
from client_app.program import Classifier, save_program
from client_app.store import COMMON_MODEL, OWN_MODEL, PERSONAL_MODEL, FolderState
from client_app.training.loop import num_correct
from common.errors import DataError, ModelError
from common.files import PRIVATE, parsed, read_file, replace_file
from common.log import logger
from common.messages import Evaluation

TEST_ROWS = "test_rows"
INPUT = "images / 255, minus mean, divided by std, per channel; float32 (B, C, H, W)"
SCALED = "values scaled so that intensity[0] becomes 0 and intensity[1] 255, in whole numbers"
ABOUT_FILES = (
    *("load", "load_own", "load_common", "prediction", "run"),
    *("program", "program_error", "program_input", "code", "frozen", "validated_on", "followed"),
)
"""Of a description: what is of its files, and of the folder that they are in."""
OTHER_WITH_WEIGHTS = "something that is neither parameter nor buffer"
PREDICTIONS = {
    "classes": "weight * softmax(own) + (1 - weight) * softmax(common)",
    "labels": "weight * sigmoid(own) + (1 - weight) * sigmoid(common)",
    "numbers": "label_mean + label_std * (weight * own + (1 - weight) * common)",
}


@dataclass(frozen=True)
class PersonalModel:
    """A trained personal model, its data and what it reached on them.

    `common` is the architecture of the second model where `module` is a predictor of two; `facts`
    are further ones, written beside it.
    """

    name: str
    module: nn.Module
    data: ClientData
    evaluation: Evaluation
    common: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def store(self, folder: Path, *, program: bool, once: Path | None = None) -> Path:
        """Write the files; returns the path of the safetensors file.

        With a folder `once`, parameters that are frozen lie there, one time for all versions, and
        `frozen.safetensors` is a link to them. A model that torch.export cannot follow keeps its
        weights and its description, which then says why there is no program.
        """
        frozen = {} if once is None else frozen_state(self.module)
        models = {PERSONAL_MODEL: self.module, OWN_MODEL: None, COMMON_MODEL: None}
        if isinstance(self.module, Predictor):
            models |= {OWN_MODEL: self.module.own, COMMON_MODEL: self.module.common}
        for name, module in models.items():
            if module is None:  # an earlier run's may be there
                (folder / f"{name}.safetensors").unlink(missing_ok=True)
                continue
            kept = module.state_dict()
            changing = {key: kept[key] for key in kept.keys() - frozen_state(module).keys()}
            FolderState(folder).save(name, changing if frozen else kept)
        description = self.describe()
        if once is not None and frozen:
            link_frozen(frozen, once, folder)
            description["frozen"] = f"{FROZEN}.safetensors: `mh-pfedhn model export` puts it in"
        if self.data.test_rows is not None:
            rows = io.BytesIO()
            np.save(rows, self.data.test_rows, allow_pickle=False)
            replace_file(folder / f"{TEST_ROWS}.npy", rows.getvalue(), mode=PRIVATE)
        if program:
            description |= self._export(folder / f"{PERSONAL_MODEL}.pt2")
        if missing := not_in_state_dict(self.module):
            description["not_in_state_dict"] = missing
        description["validated_on"] = validated_on(self.data)
        text = json.dumps(description, indent=2)
        replace_file(folder / f"{PERSONAL_MODEL}.json", text, mode=PRIVATE)
        return folder / f"{PERSONAL_MODEL}.safetensors"

    def describe(self) -> dict[str, Any]:
        """Return what a person or program needs to use the weights, as JSON-able facts."""
        data, accuracies = self.data, self.evaluation.accuracies()
        models: dict[str, Any] = {"model": self.name}
        if isinstance(self.module, Predictor):
            models["common_model"] = self.common
            models["weight_of_own_model"] = float(self.module.weight)
        found = {
            **models,
            "in_channels": data.in_channels,
            "num_classes": data.num_classes,
            **{name: fact for name, fact in data.about.items() if name != "left_out"},
            **self._input(),
            "num_test": self.evaluation.num_test,
            "num_correct": self.evaluation.num_correct,
            "test_accuracy": accuracies.pop("accuracy"),
            **accuracies,  # of the own model by itself, of the common one, alone, and the gain
            "test_rows": f"{TEST_ROWS}.npy: examples of the source, in its order, behind num_test",
        }
        return {**found, **how_to_load(found), **self._code(), **self.facts}

    def _code(self) -> dict[str, list[str]]:
        """Return the folders of the modules that build the models, where they are of one's own."""
        modules = [name.partition(":")[0] for name in (self.name, self.common) if ":" in name]
        files = [getattr(sys.modules.get(name), "__file__", None) for name in modules]
        found = [
            str(Path(f).parents[n.count(".")]) for f, n in zip(files, modules, strict=True) if f
        ]
        return {"code": found} if found else {}

    def _input(self) -> dict[str, Any]:
        """Say how the model is fed."""
        data, dtype = self.data, str(self.data.input_dtype).removeprefix("torch.")
        shape = list(data.input_shape)
        facts: dict[str, Any] = {
            "input_shape": shape,
            "mean": data.mean.tolist(),
            "std": data.std.tolist(),
        }
        facts["target"] = data.target
        if len(data.label_std):
            facts |= {name: getattr(data, name).tolist() for name in ("label_mean", "label_std")}
        if not data.is_pictures:
            words = "as the data set gives them"
            if parts := data.about.get("inputs"):
                words = f"{', '.join(parts)}, each flattened, side by side"
            return {**facts, "input": f"{dtype} (B, ...), {words}"}
        text = INPUT if "intensity" not in data.about else f"{SCALED}; {INPUT}"
        return {**facts, "image_size": shape[-1], "input": text}

    def _export(self, path: Path) -> dict[str, Any]:
        try:
            maker = (self.name, self.common, self.data.target, str(self.data.about.get("inputs")))
            save_program(self._on_cpu(), path, self.require_same_count, maker=maker)
        except Exception as error:  # torch.export raises whatever it meets in a user's model
            logger.warning("%s: no program stored, weights only: %s", self.name, error)
            path.unlink(missing_ok=True)
            return {"program": None, "program_error": f"{type(error).__name__}: {error}"[:2000]}
        return how_to_run(path.name, self._input())

    @torch.no_grad()
    def require_same_count(self, program: nn.Module) -> None:
        """Raise RuntimeError unless a program gets right what the model did, of the test examples.

        Differences of rounding may turn one in a hundred.
        """
        data, labels = self.data, self.data.test_labels.cpu()
        if len(data.label_std):
            labels = labels * data.label_std + data.label_mean
        found = [program(x.cpu().contiguous()) for x in torch.split(data.test_images, 256)]
        correct = num_correct(torch.cat(found), labels)
        wanted, tested = self.evaluation.num_correct, self.evaluation.num_test
        if abs(correct - wanted) > max(1, tested // 100):
            raise RuntimeError(
                f"the exported program gets {correct:g} of {tested} test examples right, the model "
                f"{wanted:g}: it has {OTHER_WITH_WEIGHTS}"
            )

    def _on_cpu(self) -> tuple[nn.Module, Tensor]:
        """Build the model anew with these weights, and a batch of two pictures for the export.

        The trained module shares one flat vector and has the client's own dropout inside.
        """
        data = self.data
        fresh = _built(self.describe())
        fresh.load_state_dict({k: v.detach().cpu() for k, v in self.module.state_dict().items()})
        kept = dict(self.module.named_buffers())
        for name, buffer in fresh.named_buffers():  # also those that no state_dict has
            buffer.copy_(kept[name].detach())
        scales = (data.mean, data.std, data.label_mean, data.label_std)
        whole = Classifier(fresh, *(x.cpu() for x in scales)).eval()
        return whole, torch.zeros_like(data.test_images[:1].cpu()).repeat_interleave(2, 0)


def read_predictor(folder: Path) -> tuple[Classifier, dict[str, Any]]:
    """Rebuild what was stored in a folder, and return it with its description.

    It maps uint8 pictures (B, C, H, W), or examples as the data set has them, to logits, of two
    models log-probabilities. Raises DataError
    where the folder does not hold a model; ModelError where the participant's own code is not
    found, or builds another model than that.
    """
    try:
        about = parsed(read_file(folder / f"{PERSONAL_MODEL}.json"))
        weights = load_file(folder / f"{PERSONAL_MODEL}.safetensors") | frozen_of(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder} does not hold a whole personal model: {error}") from error
    try:
        if not any(":" in str(about.get(name)) for name in ("model", "common_model")):
            with torch.device("meta"):  # sizes that no weights have would cost memory
                _built(about).load_state_dict(weights, assign=True)
        module = _built(about)
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(
            f"{about['model']} is no longer the model that was trained: {error}"
        ) from error
    scales = (about.get(name, []) for name in ("mean", "std", "label_mean", "label_std"))
    return Classifier(module, *map(torch.tensor, scales)).eval(), about


def _built(about: Mapping[str, Any]) -> nn.Module:
    """Build what a description is of, with weights of its own."""
    sizes = {"in_channels": about["in_channels"], "num_classes": about["num_classes"]}
    own, *common = (
        build_for(name, about.get("inputs", {}), **sizes)
        for name in (about["model"], about.get("common_model"))
        if name
    )
    return Predictor(own, common[0], 0.0, about.get("target", "classes")) if common else own


@torch.no_grad()
def accuracy_of(module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """Return the fraction that a model gets right, in evaluation mode; None of no example."""
    module.eval()
    found = [(module(images), labels) for images, labels in batches]
    if not found:
        return None
    logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return num_correct(logits, labels) / len(labels)


def validated_on(data: ClientData) -> str:
    """Return what tells validation examples, as a model gets them, from others."""
    digest = hashlib.sha256()
    for part in (data.validation_images, data.validation_labels):
        digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def not_in_state_dict(module: nn.Module) -> list[str]:
    """Return the buffers that plain weights lack (persistent=False); the program has them."""
    return sorted(dict(module.named_buffers()).keys() - module.state_dict().keys())


def how_to_load(about: Mapping[str, Any]) -> dict[str, str]:
    """Return the lines of Python that load the weights of a description."""
    if not about.get("common_model"):
        return {"load": _load_line(about, "model", PERSONAL_MODEL)}
    return {
        "prediction": PREDICTIONS[about["target"]],
        "load_own": _load_line(about, "model", OWN_MODEL),
        "load_common": _load_line(about, "common_model", COMMON_MODEL),
    }


def how_to_run(name: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a description says of its program."""
    pictures = "images as uint8 (B, C, H, W), any B; normalised inside"
    return {
        "program": name,
        "program_input": pictures if about["mean"] else about["input"],
        "run": f"import torch; model = torch.export.load('{name}').module(); "
        "logits = model(images)",
    }


def _load_line(about: Mapping[str, Any], which: str, file: str) -> str:
    module, own, factory = about[which].partition(":")
    build = (
        f"{module} import {factory} as factory; "
        if own
        else "client_app.models.registry import build_model; "
    )
    call = "factory(" if own else f"build_model({module!r}, "
    sizes = f"in_channels={about['in_channels']}, num_classes={about['num_classes']}"
    return (
        f"from {build}from safetensors.torch import load_file; model = {call}{sizes}); "
        f"model.load_state_dict(load_file('{file}.safetensors')); model.eval()"
    )
