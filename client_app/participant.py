"""One participant: its declarations, its data, its models, what it keeps, and what it does.

The handlers in `app.py` decode a message, call one method here and encode the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from flwr.app import Context
from torch import Tensor, nn

from client_app.cohort import Member, Outcome
from client_app.data import ClientData, load_client_data
from client_app.models.registry import model_for_partition
from client_app.personal import PersonalModel
from client_app.state import ClientState, FolderState, Stamp, open_state, personal_folder
from client_app.teacher import keep_teacher, kept_teacher, required_teacher
from client_app.training import Loss, Trained, cross_entropy, distillation, evaluate, train
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
from common.client_config import ClientSection
from common.codec import Float32
from common.config import NodeConfig, RunConfig
from common.errors import WireError
from common.params import delta
from common.seeding import stream_seed, torch_generator
from common.wire import Evaluation, Header, Registration, TrainReply, TrainTask

PERSONAL_BUFFERS, GLOBAL_BUFFERS = "personal_buffers", "global_buffers"
LEFT_OUT, GLOBAL_LEFT_OUT = "left_out", "global_left_out"


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
            num_parameters=self._personal().model.num_parameters,
            num_examples=self.data.num_train,
            num_global_parameters=self._global().model.num_parameters if self.config.distils else 0,
            group=self._tag(),
        )

    def train(self, task: TrainTask, source: str) -> TrainReply:
        """Do what a training message asks: test, train w_g, train the personal model.

        Returns
        -------
        Deltas (before minus after) of the weights exactly as they were received.
        """
        self.state.enter_federation(task.header.federation_id)
        teacher_theta = self._teacher_theta(task)
        seconds = 0.0
        global_delta = personal_delta = None
        trained = Trained(self.data.num_train, 0.0, 0.0)
        evaluation = None
        if task.train_global and teacher_theta is not None:
            trained = self._train_global(task, teacher_theta)
            global_delta = self._delta(teacher_theta, self._global(), task.header, GLOBAL_LEFT_OUT)
            seconds += trained.seconds
        if task.theta is not None:
            if task.evaluate:
                evaluation = self._evaluate(task.header, task.theta, task.header.server_round)
            trained = self._train_personal(task, task.theta, teacher_theta, source)
            personal_delta = self._delta(task.theta, self._personal(), task.header, LEFT_OUT)
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
            self.model_name, self._personal().model.module, self.data, evaluation
        )
        # the export takes seconds, and a simulation has many clients nobody deploys
        return str(personal.store(folder, program=isinstance(self.state, FolderState)))

    # --- trained together with others (in-process engine) ----------------------------------------

    @property
    def kind(self) -> ModelKind:
        """What the construction of this client's model depends on."""
        return self._kind()

    @property
    def module(self) -> nn.Module:
        """Return this thread's model of that kind, whoever's weights it holds now."""
        return self._personal().model.module

    def teacher_theta(self, task: TrainTask, source: str) -> Float32 | None:
        """Return whom a personal training learns from: w_g as sent; None without distillation.

        Raises
        ------
        WireError
            There should be one, and it is not known.
        """
        self.state.enter_federation(task.header.federation_id)
        if task.distill is None:
            return None
        return required_teacher(self._teacher_theta(task), task.header, source)

    def teacher(self, task: TrainTask, theta: Float32) -> nn.Module:
        """Return this thread's teacher with the weights theta."""
        return self._ready(self._teacher(), theta, "", task.header).model.module

    def join_cohort(self, task: TrainTask) -> tuple[Member, Evaluation | None]:
        """Test theta when asked, as `train` does, and hand over what a batched call needs."""
        self.state.enter_federation(task.header.federation_id)
        theta, now = task.theta, task.header.server_round
        if theta is None:
            raise WireError(f"client {self.client_id}: there is no theta to train in a cohort.")
        evaluation = self._evaluate(task.header, theta, now) if task.evaluate else None
        tool = self._ready(self._personal(), theta, PERSONAL_BUFFERS, task.header)
        member = Member(
            theta=tool.model.theta.detach().clone(),
            buffers=tool.buffers(),
            data=self.data,
            generator=self._shuffler("shuffle", task.header),
            dropout=torch.Generator(self.device).manual_seed(tool.generator.initial_seed()),
        )
        return member, evaluation

    def leave_cohort(
        self, task: TrainTask, outcome: Outcome, evaluation: Evaluation | None
    ) -> TrainReply:
        """Keep the buffers and make the reply of a client that was trained together with others."""
        tool = self._personal()
        tool.reset(outcome.buffers, 0)
        self._keep_buffers(tool, PERSONAL_BUFFERS, task.header)
        tool.model.load(outcome.theta)
        trained, theta, header = outcome.trained, task.theta, task.header
        return TrainReply(
            num_examples=trained.num_examples,
            train_loss=trained.loss,
            seconds=trained.seconds,
            server_round=header.server_round,
            delta=None if theta is None else self._delta(theta, tool, header, LEFT_OUT),
            evaluation=evaluation,
        )

    # --- how -------------------------------------------------------------------------------------

    def _evaluate(self, header: Header, theta: Float32, before: int) -> Evaluation:
        tool = self._ready(self._personal(), theta, PERSONAL_BUFFERS, header, before=before)
        return evaluate(tool.model, self.data)

    def _train_personal(
        self, task: TrainTask, theta: Float32, teacher_theta: Float32 | None, source: str
    ) -> Trained:
        tool = self._ready(self._personal(), theta, PERSONAL_BUFFERS, task.header)
        loss: Loss = cross_entropy
        if task.distill is not None:
            sent = required_teacher(teacher_theta, task.header, source)
            loss = distillation(self.teacher(task, sent), task.distill)
        trained = train(
            tool.model,
            self.data,
            task.training,
            generator=self._shuffler("shuffle", task.header),
            loss=loss,
        )
        self._keep_buffers(tool, PERSONAL_BUFFERS, task.header)
        return trained

    def _train_global(self, task: TrainTask, theta: Float32) -> Trained:
        tool = self._ready(self._global(), theta, GLOBAL_BUFFERS, task.header)
        trained = train(
            tool.model,
            self.data,
            task.training,
            generator=self._shuffler("shuffle-global", task.header),
            clip=False,
        )
        self._keep_buffers(tool, GLOBAL_BUFFERS, task.header)
        if task.theta is None:
            keep_teacher(self.state, theta, task.header.server_round)
        return trained

    def _teacher_theta(self, task: TrainTask) -> Float32 | None:
        """Return w_g as sent: in this message, or earlier in this round."""
        if task.global_theta is not None or task.distill is None:
            return task.global_theta
        return kept_teacher(self.state, task.header.server_round)

    def _ready(
        self, tool: Tool, theta: Float32, buffers: str, header: Header, *, before: int = 0
    ) -> Tool:
        """Make a borrowed model this client's: its weights, its buffers, its dropout.

        The buffers are the newest from a round earlier than `before`; 0 means than this round.
        """
        now = header.server_round
        seed = stream_seed(self.config.run.seed, f"dropout/{buffers}", now, self.client_id)
        kept = None
        if buffers and tool.fresh_buffers:
            kept = self.state.load(buffers, before=before or now)
        tool.reset(kept, seed)
        tool.model.load(self._placed(tool, theta))
        return tool

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

    def _keep_buffers(self, tool: Tool, name: str, header: Header) -> None:
        if tool.fresh_buffers:
            self.state.save(name, tool.buffers(), stamp=self._stamp(header))

    def _stamp(self, header: Header) -> Stamp:
        # Twice: the newest checkpoint may turn out to be damaged.
        return Stamp(header.server_round, 2 * self.config.run.checkpoint_every)

    def _delta(self, theta_sent: Float32, trained: Tool, header: Header, left_out: str) -> Float32:
        """Return before minus after (P,), all of it or the run's uplink-top-k."""
        sent = self._placed(trained, theta_sent)
        change: Float32 = delta(sent, trained.model.theta.detach()).cpu().numpy()
        top_k = self.config.wire.uplink_top_k
        if top_k == 1:
            return change
        memory = Memory(self.state, left_out, self._stamp(header))
        return largest_with_memory(change, memory, top_k=top_k, precision=header.precision)

    def _shuffler(self, purpose: str, header: Header) -> torch.Generator:
        return torch_generator(
            self.config.run.seed,
            purpose,
            server_round=header.server_round,
            client_id=self.client_id,
        )

    def _kind(self) -> ModelKind:
        return ModelKind(self.model_name, self.data.in_channels, self.data.num_classes, self.device)

    def _personal(self) -> Tool:
        return borrow(self._kind())

    def _global(self) -> Tool:
        name = self.config.distill.global_model
        return borrow(replace(self._kind(), name=name, role="global"))

    def _teacher(self) -> Tool:
        name = self.config.distill.global_model
        return borrow(replace(self._kind(), name=name, role="teacher"))

    def _tag(self) -> str:
        """Return a hash of what the node declared, or of its model; "" unless heads go by tag."""
        if self.config.hypernet.head_sharing != "tag":
            return ""
        return opaque(self.head_tag) if self.head_tag else architecture_tag(self._personal())
