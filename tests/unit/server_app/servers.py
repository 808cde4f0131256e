"""Servers of the methods, their clients and what these hand in, as tests make them."""

import numpy as np

from common.class_means import ClassMeans
from common.config import RunConfig
from common.methods import method_class
from server_app.clients import Client
from server_app.methods.base import Method, Upload


def client(client_id: str, **facts: object) -> Client:
    sizes = {"num_parameters": 6, "num_classes": 4, "feature_dim": 3, "group": "aa"}
    return Client(
        client_id=client_id,
        node_id=1,
        num_examples=10,
        **{"num_global_parameters": 5, **sizes, **facts},
    )


def config(method: str, **settings: object) -> RunConfig:
    flat = {k.replace("_", "-"): v for k, v in settings.items()}
    return RunConfig.parse({"method": method, "validation-fraction": 0.1, **flat})


def adapted(name: str, **settings: object) -> RunConfig:
    return method_class(name, "server_app").adapted(config(name, **settings))


def make(name: str, **settings: object) -> Method:
    return method_class(name, "server_app")(config(name, max_delta_norm=100.0, **settings))


def learn(server: Method, uploads: list[Upload], server_round: int) -> None:
    server.learn(uploads, server_round=server_round, progress=float(server_round))


def open_round(server: Method, clients: list[Client]) -> None:
    for one in clients:
        server.add_client(one)
    server.open_round(1, clients, lambda *_: [])


def means(rng: np.random.Generator, classes: list[int], dim: int = 3) -> ClassMeans:
    labels = np.array(classes)
    return ClassMeans.of(rng.normal(size=(len(labels), dim)).astype(np.float32), labels, 4)
