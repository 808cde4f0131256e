"""One participant: its declarations, its data, its models, what it keeps, and what it does.

The handlers in `app.py` decode a message, call one method here and encode the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from flwr.app import Context
from torch import Tensor, nn

from client_app.data.examples import ClientData, load_client_data
from client_app.models.registry import model_for_partition
from client_app.personal import PersonalModel
from client_app.store import ClientState, FolderState, Stamp, open_state, personal_folder
from client_app.training.batched import Member
from client_app.training.loop import Loss, Trained, cross_entropy, distillation, evaluate, train
from client_app.training.teacher import keep_teacher, kept_teacher, required_teacher
from client_app.uplink import Memory, largest_with_memory
from client_app.workshop import (
    ModelKind,
    Tool,
    architecture_tag,
    borrow,
    offset_theta,
    opaque,
    pick_device,
)
from common.compression import Float32
from common.config import NodeConfig, RunConfig
from common.config.client import ClientSection
from common.parameters import delta
from common.seeding import stream_seed, torch_generator
from common.wire import Evaluation, Header, Registration, TrainReply, TrainTask


@dataclass(frozen=True)
class Role:
    """One of the two models that a client trains.

    `tool` is its place in the workshop; `buffers` and `left_out` are the names under which the
    client keeps what stays here; `clip` says whether the gradient's norm is clipped.
    """

    tool: str
    buffers: str
    shuffle: str
    left_out: str
    clip: bool


PERSONAL = Role("personal", "personal_buffers", "shuffle", "left_out", clip=True)
GLOBAL = Role("global", "global_buffers", "shuffle-global", "global_left_out", clip=False)
"""w_g is trained without clipping (method.md, Phase 1)."""


@dataclass(frozen=True)
class Participant:
    """A client for the duration of one message."""

    client_id: str
    config: RunConfig
    section: ClientSection
    data: ClientData
    device: torch.device
    model_name: str
    state: ClientState
    head_tag: str = ""

    @classmethod
    def open(cls, context: Context) -> Participant:
        """Read both configs, load the data, open the state; what the node declared wins.

        Raises
        ------
        ConfigError, DataError, ModelError
            Something declared cannot be used; the message says what to change.
        """
        config = RunConfig.parse(context.run_config)
        node = NodeConfig.parse(context.node_config)
        section = node.client_section(config)
        device = pick_device(section.device)
        data = load_client_data(
            section, partition_id=node.partition_id, seed=config.run.seed, device=device
        )
        return cls(
            client_id=node.identity,
            config=config,
            section=section,
            data=data,
            device=device,
            model_name=model_for_partition(
                section.models, node.partition_id, section.num_partitions
            ),
            state=open_state(context, section.state_dir, node.identity),
            head_tag=node.head_tag,
        )

    # --- what it is asked ------------------------------------------------------------------------

    def register(self) -> Registration:
        """Say who this is and how large its model is; nothing else unless heads go by tag."""
        return Registration(
            client_id=self.client_id,
            num_parameters=self._tool(PERSONAL).model.num_parameters,
            num_examples=self.data.num_train,
            num_global_parameters=self._global_parameters(),
            group=self._tag(),
        )

    def train(self, task: TrainTask, source: str) -> TrainReply:
        """Do what a training message asks: test, train w_g, train the personal model.

        Returns
        -------
        Deltas (before minus after) of the weights exactly as they were received.
        """
        sent = self.teacher_theta(task)
        seconds = 0.0
        global_delta = personal_delta = None
        trained = Trained(self.data.num_train, 0.0, 0.0)
        if task.train_global and sent is not None:
            trained = self._train(GLOBAL, task, sent, cross_entropy)
            global_delta = self._close(GLOBAL, task, sent)
            seconds += trained.seconds
        evaluation = self.test_received(task)
        if task.theta is not None:
            trained = self._train(PERSONAL, task, task.theta, self._loss(task, sent, source))
            personal_delta = self._close(PERSONAL, task, task.theta)
            seconds += trained.seconds
        return TrainReply(
            num_examples=trained.num_examples,
            train_loss=trained.loss,
            seconds=seconds,
            server_round=task.header.server_round,
            delta=personal_delta,
            global_delta=global_delta,
            evaluation=evaluation,
        )

    def test_received(self, task: TrainTask) -> Evaluation | None:
        """Test theta as it was received, before it is trained, where the task asks for it."""
        if task.theta is None or not task.evaluate:
            return None
        return self._evaluate(task.header, task.theta, task.header.server_round)

    def evaluate(self, header: Header, theta: Float32) -> Evaluation:
        """Test theta (K_i,) exactly as received, with this client's own BatchNorm statistics."""
        self.state.enter_federation(header.federation_id)
        return self._evaluate(header, theta, header.server_round + 1)

    def finish(self, header: Header, theta: Float32) -> str:
        """Store the personal model as a plain torch state_dict; returns its path, or "" if none.

        Without a state folder it goes below the run's output folder, and nowhere without either.
        """
        return self.store(self.evaluate(header, theta))

    def store(self, evaluation: Evaluation) -> str:
        """Store the weights that the personal model holds now; returns their path, or ""."""
        folder = personal_folder(self.state, self.config.run.output_dir, self.client_id)
        if folder is None:
            return ""
        personal = PersonalModel(
            self.model_name, self._tool(PERSONAL).model.module, self.data, evaluation
        )
        # the export takes seconds, and a simulation has many clients nobody deploys
        return str(personal.store(folder, program=isinstance(self.state, FolderState)))

    # --- trained together with others (in-process engine) ----------------------------------------

    @property
    def kind(self) -> ModelKind:
        """What the construction of this client's own model depends on."""
        return self.kind_of(PERSONAL)

    def kind_of(self, role: Role) -> ModelKind:
        """What the construction of one of the two models depends on."""
        name = self.model_name if role is PERSONAL else self.config.distill.global_model
        sizes = (self.data.in_channels, self.data.num_classes)
        return ModelKind(name, *sizes, self.device, role.tool)

    def module(self, role: Role) -> nn.Module:
        """Return this thread's model for a role, whoever's weights it holds now."""
        return self._tool(role).model.module

    def teacher_theta(self, task: TrainTask) -> Float32 | None:
        """Return w_g as sent, in this message or earlier in this round; None if unknown."""
        self.state.enter_federation(task.header.federation_id)
        if task.global_theta is not None or task.distill is None:
            return task.global_theta
        return kept_teacher(self.state, task.header.server_round)

    def teacher(self, task: TrainTask, theta: Float32) -> nn.Module:
        """Return this thread's teacher with the weights theta."""
        tool = borrow(replace(self.kind_of(GLOBAL), role="teacher"))
        return self._ready(tool, theta, "", task.header).model.module

    def placed(self, role: Role, thetas: Float32) -> Tensor:
        """Return the weights (..., P) that generated thetas stand for, on the device.

        For as many clients of this one's architecture as there are rows, in one transfer.
        """
        return self._placed(self._tool(role), thetas)

    def join_cohort(self, role: Role, task: TrainTask, placed: Tensor) -> Member:
        """Hand over what a batched call needs to test or train one of the client's models.

        `placed` (P,) are its weights on the device.
        """
        tool, header = self._tool(role), task.header
        kept = self._kept_buffers(tool, role.buffers, before=header.server_round)
        return Member(
            theta=placed,
            buffers=tool.fitting(kept),
            data=self.data,
            generator=self._shuffler(role.shuffle, header),
            dropout=torch.Generator(self.device).manual_seed(
                self._dropout_seed(role.buffers, header)
            ),
        )

    # --- how -------------------------------------------------------------------------------------

    def _evaluate(self, header: Header, theta: Float32, before: int) -> Evaluation:
        tool = self._ready(self._tool(PERSONAL), theta, PERSONAL.buffers, header, before=before)
        return evaluate(tool.model, self.data)

    def _loss(self, task: TrainTask, teacher_theta: Float32 | None, source: str) -> Loss:
        if task.distill is None:
            return cross_entropy
        sent = required_teacher(teacher_theta, task.header, source)
        return distillation(self.teacher(task, sent), task.distill)

    def _train(self, role: Role, task: TrainTask, theta: Float32, loss: Loss) -> Trained:
        tool = self._ready(self._tool(role), theta, role.buffers, task.header)
        return train(
            tool.model,
            self.data,
            task.training,
            generator=self._shuffler(role.shuffle, task.header),
            loss=loss,
            clip=role.clip,
        )

    def _close(self, role: Role, task: TrainTask, theta: Float32) -> Float32:
        """Keep what stays here of a model just trained from theta; returns what goes up."""
        tool = self._tool(role)
        change: Float32 = delta(self._placed(tool, theta), tool.model.theta.detach()).cpu().numpy()
        return self.keep(role, task, theta, tool.buffers(), change)

    def keep(
        self,
        role: Role,
        task: TrainTask,
        theta: Float32,
        buffers: dict[str, Tensor],
        change: Float32,
    ) -> Float32:
        """Keep what stays here of a model that was trained; returns what goes up.

        `theta` is what was sent, `change` (P,) the delta: before minus after.
        """
        header = task.header
        if buffers:
            self.state.save(role.buffers, buffers, stamp=self._stamp(header))
        if role is GLOBAL and task.theta is None:
            keep_teacher(self.state, theta, header.server_round)
        top_k = self.config.wire.uplink_top_k
        if top_k == 1:
            return change
        memory = Memory(self.state, role.left_out, self._stamp(header))
        return largest_with_memory(change, memory, top_k=top_k, precision=header.precision)

    def _ready(
        self, tool: Tool, theta: Float32, buffers: str, header: Header, *, before: int = 0
    ) -> Tool:
        """Make a borrowed model this client's: its weights, its buffers, its dropout.

        The buffers are the newest from a round earlier than `before`; 0 means than this round.
        """
        kept = self._kept_buffers(tool, buffers, before=before or header.server_round)
        tool.reset(kept, self._dropout_seed(buffers, header))
        tool.model.load(self._placed(tool, theta))
        return tool

    def _kept_buffers(self, tool: Tool, name: str, *, before: int) -> dict[str, Tensor] | None:
        """Return the newest buffers from a round earlier than `before`; None where there are none.

        "" as a name stands for a model whose buffers nobody keeps.
        """
        if not name or not tool.fresh_buffers:
            return None
        return self.state.load(name, before=before)

    def _dropout_seed(self, buffers: str, header: Header) -> int:
        seed = self.config.run.seed
        return stream_seed(seed, f"dropout/{buffers}", header.server_round, self.client_id)

    def _placed(self, tool: Tool, theta: Float32) -> Tensor:
        """Return the weights that a generated theta (K_i,) stands for, on the device.

        With a `theta-offset` they are the model's own initialisation plus theta. The server learns
        nothing new from it: who has the same architecture has the same offset.
        """
        received = torch.from_numpy(theta).to(self.device)
        if self.section.theta_offset == "none":
            return received
        seed = stream_seed(self.config.run.seed, "theta-offset")
        kind = tool.kind
        return received + offset_theta(
            kind.name, kind.in_channels, kind.num_classes, kind.device, seed
        )

    def _stamp(self, header: Header) -> Stamp:
        # Twice: the newest checkpoint may turn out to be damaged.
        return Stamp(header.server_round, 2 * self.config.run.checkpoint_every)

    def _shuffler(self, purpose: str, header: Header) -> torch.Generator:
        return torch_generator(
            self.config.run.seed,
            purpose,
            server_round=header.server_round,
            client_id=self.client_id,
        )

    def _tool(self, role: Role) -> Tool:
        return borrow(self.kind_of(role))

    def _global_parameters(self) -> int:
        return self._tool(GLOBAL).model.num_parameters if self.config.distils else 0

    def _tag(self) -> str:
        """Return a hash of what the node declared, or of its model; "" unless heads go by tag."""
        if self.config.hypernet.head_sharing != "tag":
            return ""
        return opaque(self.head_tag) if self.head_tag else architecture_tag(self._tool(PERSONAL))
