"""Local training, distillation from the global model, and the baselines' own settings."""

from __future__ import annotations

from typing import Literal

from common.config.section import Section, key


class TrainingSection(Section):
    """Local training of one client in one round (docs/method.md, "Local training")."""

    local_epochs: int = key(1, "passes over a client's examples in a round", ge=1)
    batch_size: int = key(16, "of a local step; FedGH, FedTGP: also of a server step", ge=1)
    optimizer: Literal["sgd", "adamw"] = key(
        "sgd", '"sgd" with momentum, or "adamw", which wants a rate near 0.001'
    )
    learning_rate: float = key(0.03, "local rate, of the first round", gt=0, le=1000)
    learning_rate_final: float = key(
        1.0, "fraction of it that the last round has, along a cosine; 1: constant", gt=0, le=1
    )
    local_patience: int = key(
        0,
        "a round's training ends after so many epochs without a lower loss on the validation "
        "examples, with the weights of the best epoch; 0: after all local-epochs",
        where="all methods but FML, FedKD and pFedHN",
        ge=0,
    )
    momentum: float = key(
        0.9, "starts afresh every round; 0: none", where='optimizer "sgd"', ge=0, lt=1
    )
    weight_decay: float = key(
        2e-3, 'times the weights, added to the gradient ("adamw": to the step); 0: none', ge=0
    )
    label_smoothing: float = key(
        0.0, "part of a label that all classes share in training; 0: none", ge=0, lt=1
    )
    client_clip_norm: float = key(
        50.0, "a batch's longer gradient is scaled down to it (w_g's is not)", unit="norm", gt=0
    )
    training_precision: Literal["float32", "bfloat16"] = key(
        "float32", '"bfloat16": products of forward and backward in it; all else float32'
    )


class DistillSection(Section):
    """MH-pFedHNGD: the global model and the distillation from it (paper section 3.3)."""

    global_model: str = key(
        "auto",
        "architecture of w_g, of the common models, and of a baseline's second model; auto: cnn "
        "for pictures of 32x32, resnet10 for others, perceptron for tables, conv1d, conv2d, conv3d "
        "for series and volumes, tokens for texts",
        where="MH-pFedHNGD, MH-pFedHN-PG, FML, FedKD, local-ensemble",
    )
    gd_mode: Literal["separate", "fused"] = key(
        "separate", '"separate": w_g in a message of its own, as published; "fused": in the same',
        where="MH-pFedHNGD",
    )  # fmt: skip
    distill_alpha: float = key(
        0.02,
        "weight of the teacher; MH-pFedHN-PG: the most, for one that leads by far",
        where="MH-pFedHNGD, MH-pFedHN-PG",
        ge=0,
        le=1,
    )
    distill_temperature: float = key(
        10.0, "logits of teacher and student are divided by it", where="MH-pFedHNGD", gt=0
    )


class BaselineSection(Section):
    """What a baseline needs beside local training (docs/baselines.md says where each is from)."""

    fedprox_mu: float = key(
        0.01, "times half the squared distance to the weights received", where="FedProx", ge=0
    )
    prototype_weight: float = key(
        10.0, "of the squared distance to the prototypes", where="FedProto, FedTGP", ge=0
    )
    baseline_server_lr: float = key(
        0.01, "plain SGD on the server", where="FedGH, FedTGP, pFedHN", gt=0
    )
    pfedhn_batches: int = key(
        50, "local batches a round; 0: local-epochs, as every other method", where="pFedHN", ge=0
    )
