"""A causal language model of transformers over packed batches, under FSDP2: the base of policy and critic.

    build(): on the meta device, no memory -> shard(): memory for this rank's rows -> read_initial_weights(),
    or the rows of a checkpoint

Buffers (rotary frequencies and the like) are real from the start and computed by transformers' own
initialization, as `from_pretrained` does. Those that the checkpoint contains (the correction biases of
routers) are read from the initial model's files, also on a resume. Of a model that wraps encoders of other
inputs only the language model is built (`areal_like/weights/untrained.py`).

No rank ever holds the whole model. The weights that are trained are float32 (masters), the forward runs in
`dtype` through FSDP2's mixed precision. With an adapter (`lora.py`) the weights of the base are frozen and
kept in `dtype`. Dropout is off, because the trained policy has to be the one that the engine samples from;
only supervised training turns on that of an adapter (`lora.use_dropout`).

Left out: tensor and pipeline parallelism; separate FSDP groups for heads, which run once for each chunk of
tokens: every chunk would gather the weight and reduce its gradient again.

In a context group (`Ranks.context`) a rank computes its part of a micro-batch's rows, and the values of all
sampled tokens are gathered (`of_all`).

Shape suffixes: T packed tokens, U rows that the model computes for them, R those of this rank, S sampled
tokens, C those whose values this rank computes, D hidden size.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, GenerationConfig

from areal_like.automatic_settings import compute_dtype
from areal_like.config import Config, LoraConfig
from areal_like.config.trainer import Recomputation
from areal_like.context_parallel import context_obstacle
from areal_like.errors import ConfigError, first_line
from areal_like.precision import RouterDtype, route_in_float32, routers
from areal_like.weights.adapters import AdapterHeader, base_digest
from areal_like.weights.hf_layout import hf_tensors
from areal_like.weights.safetensors_header import StoredTensor, tensors_in
from areal_like.weights.untrained import (
    auto_class,
    decoder_of,
    frozen_parameters,
    is_wrapped,
    left_out,
    persistent_buffers,
    read_buffers,
    set_apart,
    set_buffer,
    text_config,
)
from trainer.attention.context import ContextExchange
from trainer.attention.linear import CLASSES as LINEAR_CLASSES
from trainer.attention.linear import LINEAR, check_kernels, linear_layers, pack_linear_layers
from trainer.attention.packed_attention import ATTENTION_NAME, Kind
from trainer.batching.packing import PackedBatch
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models import lora, peft_folder
from trainer.models.kernels import apply_liger
from trainer.models.recomputation import recompute_layers
from trainer.models.router_replay import RouterReplay
from trainer.models.row_loading import StoredNames, copy_rows, stored_names
from trainer.models.safetensors_rows import SafetensorsRows
from trainer.models.wide_vectors import WideVectors, wide_vectors

SMALLEST_SHARDED_APART = 32 << 20
"""Smallest model, in bytes, whose layers are gathered and reduced one by one. In a smaller model the fixed
cost of a collective exceeds the transfer: the whole model is gathered at once, and once per step."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PackedModel(nn.Module):
    """Base class; a subclass defines `forward`. `model` keeps its Hugging Face parameter names."""

    def __init__(self, model: Any, *, router_dtype: RouterDtype = "float32") -> None:
        """`model`: a transformers causal LM, which is modified in place. `router_dtype`: the resolved
        `model.router_dtype`. Raises ConfigError for layers that would carry state from one packed sequence
        into the next."""
        super().__init__()
        self.model = model
        self._path = ""
        self._tied: Mapping[str, str] = {}
        self._lora, self._seed = LoraConfig(), 0
        self._ranks: Ranks | None = None
        self.replay: RouterReplay | None = None
        """`model.router_replay`."""
        self.dtype = torch.float32
        """Dtype of the forward; see `shard`."""
        self.reshard_after_forward = True
        """See `shard`."""
        self.attention: Kind = "auto"
        """`trainer.attention`."""
        _check_layers(model)
        self.linear_layers = pack_linear_layers(model)
        self.shares_prefixes = not self.linear_layers
        """A prefix that sequences have in common may be computed once; see `collate`."""
        self.float32_names: frozenset[str] = frozenset()
        """Parameters of `model` that stay float32 beside a narrower `model.dtype`, pushed and saved too."""
        self._wide: WideVectors | None = None
        # Not of a wrapper: transformers would warn of the configurations of its encoders, which are absent.
        wrapped = is_wrapped(model.config)
        (decoder_of(model) if wrapped else model).set_attn_implementation(ATTENTION_NAME)
        route_in_float32(model, product=router_dtype)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.eval()

    @classmethod
    def build(
        cls,
        path: str,
        *,
        gradient_checkpointing: Recomputation = False,
        offload_activations: bool = False,
        compiles: bool = False,
        liger: bool = False,
        liger_rope: bool = True,
        router_replay: bool = False,
        master_dtype: torch.dtype = torch.float32,
        lora_settings: LoraConfig | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Self:
        """The model of a Hugging Face directory or name on the meta device: call `shard`, then read weights.

        `gradient_checkpointing`, `offload_activations`: see `recomputation.py`.
        `compiles`: norms and MLPs run by torch.compile. `liger`: norms, rotary embeddings and SwiGLU are
        Liger's, where it supports the model; the embeddings only with `liger_rope`, which has to be equal for
        all models of the process. `router_replay`: the experts of a batch's routes are used.
        `lora_settings`: with a rank, an adapter is trained and the rest is frozen; `seed`: of a new adapter.
        `settings`: the settings of the subclass. Raises ConfigError for an architecture that cannot be
        trained, or whose routers cannot be replayed.
        """
        model = cls.skeleton(path, dtype=master_dtype)
        tied = tied_names(model)
        built = cls(model, **settings)
        built._path, built._tied, built._seed = path, tied, seed
        if lora_settings is not None and lora_settings.is_on:
            built._lora = lora_settings
            lora.add_adapter(model, lora_settings)
            for name, param in model.named_parameters():
                if name in built.fresh_parameters():
                    param.requires_grad_(True)
        decoder_layers(model)  # these may raise, before memory is allocated
        hf_tensors(model)
        built.float32_names = wide_vectors(model, path, tied=tied, fresh=built.fresh_parameters())
        if compiles:
            _compile_layers(model)
        if liger:
            apply_liger(model, rope=liger_rope and gradient_checkpointing != "selective")
        if router_replay:
            built.replay = RouterReplay(model, decoder_layers(model))
        if gradient_checkpointing:
            recompute_layers(model, kind=gradient_checkpointing, offload=offload_activations)
        return built

    @classmethod
    def skeleton(cls, path: str, *, dtype: torch.dtype) -> Any:
        """As `build_skeleton`, of the class that this model wraps."""
        return build_skeleton(path, dtype=dtype)

    @classmethod
    def load(
        cls,
        path: str,
        ranks: Ranks,
        *,
        dtype: str = "float32",
        frozen: bool = False,
        reshard_after_forward: bool = True,
        **settings: Any,
    ) -> Self:
        """`build`, `shard` and `read_initial_weights`. `settings`: as in `build`."""
        built = cls.build(path, **settings)
        built.shard(ranks, dtype=dtype, frozen=frozen, reshard_after_forward=reshard_after_forward)
        return built.read_initial_weights()

    def shard(
        self,
        ranks: Ranks,
        *,
        dtype: str = "float32",
        frozen: bool = False,
        reshard_after_forward: bool = True,
    ) -> Self:
        """Shards in place (each decoder layer, the embedding, the rest) and gives this rank's rows memory.
        A model below SMALLEST_SHARDED_APART is sharded as a whole.

        `frozen`: for a model that is never trained: held in `dtype` and resharded after every forward.
        `reshard_after_forward`: False keeps the layers of a training forward gathered until its backward.

        Returns itself, with undefined weights. Gradients are summed over ranks and not averaged: the step
        divides by global counts, once. Raises ConfigError if the ranks of a context group cannot divide its
        attention.
        """
        if ranks.context is not None:
            obstacle = context_obstacle(text_config(self.model.config).to_dict(), ranks.context.size)
            if obstacle:
                raise ConfigError(obstacle)
        compute = self.dtype = DTYPES[dtype]
        if self.linear_layers:
            check_kernels(ranks.device, kind=self.attention, dtype=compute)
        precision = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute,
            reduce_dtype=None if compute == torch.float32 else torch.float32,
        )
        if frozen:
            self.requires_grad_(False)
        if compute != torch.float32:
            for name, param in self.model.named_parameters():
                # Parameters only: `self.to` would also round the rotary frequencies.
                if not param.requires_grad and param.dtype != compute and name not in self.float32_names:
                    param.data = param.data.to(compute)
        self.reshard_after_forward = reshards = reshard_after_forward or frozen
        num_bytes = sum(param.numel() * param.itemsize for param in self.parameters())
        apart = [*decoder_layers(self.model), *self._embeddings_apart()]
        for module in apart if num_bytes >= SMALLEST_SHARDED_APART else ():
            fully_shard(module, mesh=ranks.mesh, mp_policy=precision, reshard_after_forward=reshards)
        fully_shard(self, mesh=ranks.mesh, mp_policy=precision, reshard_after_forward=frozen)
        for module in self.modules():
            if isinstance(module, FSDPModule) and ranks.num_shards > 1:
                module.set_gradient_divide_factor(1.0)
                # gloo supports only a plain sum, which is exact.
                module.set_force_sum_reduction_for_comms(True)
        buffers = dict(self.named_buffers())
        self.to_empty(device=ranks.device)
        for name, buffer in buffers.items():  # to_empty has emptied them too
            set_buffer(self, name, buffer.to(ranks.device))
        self._ranks = ranks
        if compute != torch.float32 and self.float32_names:
            self._wide = WideVectors(self.model, self.float32_names, self.linear_layers)
        return self

    def made_ready(
        self, config: Config, ranks: Ranks, *, frozen: bool = False, with_weights: bool = True
    ) -> Self:
        """`shard` with the settings of `config`, and reads the initial weights. `with_weights`: False leaves
        those that are trained undefined, for a caller that reads a checkpoint into them. Returns itself.
        Collective."""
        self.attention = config.trainer.attention
        self.shard(
            ranks,
            dtype=compute_dtype(config),
            frozen=frozen,
            reshard_after_forward=config.trainer.reshard_after_forward,
        )
        if with_weights:
            return self.read_initial_weights()
        self.read_untrained()
        return self

    def check_initial_weights(self) -> None:
        """Compares names, shapes and dtypes in the files of the model that `build` named; reads no weights.

        Raises ConfigError if the files do not fit the model.
        """
        self._stored  # noqa: B018 - reads the headers

    @functools.cached_property
    def _stored(self) -> StoredNames:
        source = SafetensorsRows.of_model(self._path)
        return stored_names(self.model, source, tied=self._tied, fresh=self.fresh_parameters())

    @property
    def stored(self) -> StoredNames | None:
        """What the tensors in the initial model's files are; None if these files are gone and not needed.

        Raises ConfigError if they are gone and hold tensors that a checkpoint has to contain.
        """
        needs_files = bool(left_out(self.model)) or next(persistent_buffers(self.model), None) is not None
        try:
            return self._stored if self._path else None
        except ConfigError:
            if needs_files:
                raise
            return None

    def untouched(self) -> list[StoredTensor]:
        """Tensors of the initial model's files that every checkpoint has unchanged. Raises ConfigError."""
        if (stored := self.stored) is None or not stored.untouched:
            return []
        try:
            files = SafetensorsRows.of_model(self._path).files
            places = {tensor.name: tensor for path in files for tensor in tensors_in(path)}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._path}: its weights cannot be read ({error})") from None
        return [places[name] for name in stored.untouched]

    @torch.no_grad()
    def read_initial_weights(self) -> Self:
        """Reads this rank's rows of the model that `build` named, and of the adapter of `model.lora.path`.

        Parameters that they lack become zero, a new adapter `lora.initialize`. Returns itself. Raises
        ConfigError if the files do not fit the model, or are others on machines of other replicas.
        Collective.
        """
        self.read_base()
        assert self._ranks is not None
        place = {"rank": self._ranks.shard_rank, "world_size": self._ranks.num_shards}
        if self._lora.is_on and self._lora.path:
            peft_folder.read_adapter(self.model, self._lora, base=self.adapter_header.base, **place)
        elif self._lora.is_on:
            lora.initialize(self.model, seed=self._seed, **place)
        self.check_replicas()
        return self

    def check_replicas(self, others: Iterable[Tensor] = ()) -> None:
        """Raises ConfigError on every rank if the replicas have read different weights. Collective.

        `others`: more rows that were read.
        """
        assert self._ranks is not None, "shard() first"
        rows = [local(param.detach()) for param in self.parameters()]
        buffers = [buffer for _, buffer in persistent_buffers(self.model)]
        if difference := self._ranks.difference_of_replicas([*rows, *buffers, *others]):
            raise ConfigError(
                f"trainer.replicas={self._ranks.num_replicas}: {difference}, after reading {self._path} or a "
                "checkpoint: every machine of the trainer needs the same files there"
            )

    @property
    def has_adapter(self) -> bool:
        """True if an adapter is trained, and the rest of the model is frozen."""
        return self._lora.is_on

    @functools.cached_property
    def adapter_header(self) -> AdapterHeader:
        """What identifies the adapter and its base. Raises ConfigError if the base's files cannot be read."""
        return AdapterHeader(
            rank=self._lora.rank,
            alpha=self._lora.alpha,
            targets=lora.targets_of(self.model),
            base=base_digest(SafetensorsRows.of_model(self._path).files),
        )

    @property
    def base_path(self) -> str:
        """Directory or name of the model that `build` named."""
        return self._path

    @torch.no_grad()
    def read_base(self) -> None:
        """Reads this rank's rows of everything except the adapter. Raises ConfigError."""
        assert self._ranks is not None, "shard() first"
        fresh = self.fresh_parameters()
        for name, param in self.model.named_parameters():
            if name in fresh:
                local(param).zero_()
        copy_rows(
            self.model,
            SafetensorsRows.of_model(self._path),
            self._stored.tensors,
            self._stored.names,
            rank=self._ranks.shard_rank,
            world_size=self._ranks.num_shards,
        )
        self._read_buffers()

    def read_untrained(self) -> None:
        """Reads what the rows of a checkpoint do not have: buffers, and with an adapter its base.

        For a caller that reads a checkpoint instead of `read_initial_weights`. Raises ConfigError.
        """
        if self.linear_layers and self.dtype != torch.float32:
            self._stored  # noqa: B018 - without these files `float32_names` would be empty
        if self.has_adapter:
            self.read_base()
        else:
            self._read_buffers()

    def _read_buffers(self) -> None:
        if next(persistent_buffers(self.model), None) is not None:
            read_buffers(self.model, SafetensorsRows.of_model(self._path).files)

    def fresh_parameters(self) -> frozenset[str]:
        """Parameters of `model` that no checkpoint of a language model has: they start at zero."""
        return frozenset()

    def _embeddings_apart(self) -> list[nn.Module]:
        """The input embedding, unless it is tied to the head: unlike the head, it is used once."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        return [] if head is None or embedding.weight is head.weight else [embedding]

    @contextlib.contextmanager
    def routed_live(self) -> Iterator[None]:
        """Its own routers choose the experts within the block."""
        replay, self.replay = self.replay, None
        try:
            yield
        finally:
            self.replay = replay

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Last hidden states [C, D] at the position before each of `batch.target_C`, where its logits come
        from: each sampled token, or in a context group this rank's part of them. Collective.

        A sequence's first token is never sampled, so there is always a position before.
        """
        if batch.context is not None:
            read_C = batch.context.read_C
        else:
            read_C = batch.sampled_S - 1
            if batch.rows is not None:
                read_C = batch.rows.row_T.index_select(0, read_C)
        return self.hidden_rows(batch).index_select(0, read_C)

    def hidden_rows(self, batch: PackedBatch) -> Tensor:
        """Last hidden states [R, D] of the rows that this rank computes: all (U), or in a context group a
        part. Collective. Raises ConfigError for layers that do not keep the sequences apart."""
        assert self.shares_prefixes or batch.shared is None
        if self._wide is not None:
            self._wide.gather()
        tokens, positions = batch.tokens_T, batch.positions_T
        routes_ULK, exchange = batch.routes_ULK, None
        if (part := batch.context) is not None:
            assert self._ranks is not None and self._ranks.context is not None
            tokens, positions = (x.index_select(0, part.token_R) for x in (tokens, positions))
            exchange = ContextExchange(self._ranks.context, num_rows=part.num_rows)
            routes_ULK = None if routes_ULK is None else routes_ULK.index_select(0, part.row_R)
        elif (rows := batch.rows) is not None:
            tokens, positions = (x.index_select(0, rows.token_U) for x in (tokens, positions))
        layout = batch.attention_layout
        layout.users.clear()
        hidden_RD: Tensor = decoder_of(self.model)(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            packed_layout=layout,
            packed_kind=self.attention,
            packed_context=exchange,
            **({} if self.replay is None else self.replay.arguments(routes_ULK)),
        ).last_hidden_state[0]
        if len(layout.users) < self._num_layers:
            raise ConfigError(
                f"{type(self.model).__name__} cannot be trained packed: {len(layout.users)} of its "
                f"{self._num_layers} layers use transformers' attention interface, and the others would mix "
                "the sequences of a batch. Choose another model"
            )
        return hidden_RD

    @functools.cached_property
    def _num_layers(self) -> int:
        return len(decoder_layers(self.model))

    def of_all(self, batch: PackedBatch, values: Sequence[Tensor]) -> list[Tensor]:
        """[S] values of a micro-batch's sampled tokens, from those [C] that each rank of the context group
        has computed; one that has no gradient here has none there. Collective in the group."""
        if (part := batch.context) is None:
            return list(values)
        assert self._ranks is not None and self._ranks.context is not None
        padding = part.most_sampled - len(part.target_C)
        own_VC = torch.stack([F.pad(value_C, (0, padding)) for value_C in values])
        all_NVC = self._ranks.context.gather(own_VC)
        found = [all_NVC[:, at].reshape(-1).index_select(0, part.place_S) for at in range(len(values))]
        return [
            value_S if value_C.requires_grad else value_S.detach()
            for value_S, value_C in zip(found, values, strict=True)
        ]

    def at_tokens(self, batch: PackedBatch, value_R: Tensor, at_S: Tensor) -> Tensor:
        """[S] values of the tokens `at_S` (int64 indices into T) of a micro-batch, from those [R] of the rows
        that each rank of the context group has computed. Collective in the group."""
        value_U = value_R
        if batch.context is not None:
            assert self._ranks is not None and self._ranks.context is not None
            value_U = self._ranks.context.gather(value_R).T.reshape(-1)  # rank c has the rows c, c + N, ...
        return value_U.index_select(0, at_S if batch.rows is None else batch.rows.row_T.index_select(0, at_S))


def build_skeleton(path: str, *, dtype: torch.dtype, auto_class: Callable[[Any], Any] = auto_class) -> Any:
    """The causal LM of a Hugging Face directory or name, its parameters on the meta device in `dtype`.

    A wrapper has no encoders of other inputs. `auto_class`: gives the class of transformers that makes the
    model of a configuration, which it may change. Raises ConfigError for an architecture that transformers
    does not know, for quantized weights, and for a generation_config.json that contradicts itself.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
        raise ConfigError(
            f"{path}: transformers has no causal language model for it ({first_line(error)})"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{path}: its weights are quantized, which cannot be trained: name another model")
    set_apart(model, frozen=frozen_parameters(model))
    _compute_buffers(model)
    # Without generation_config.json, the generation config made from the model's configuration stays.
    try:
        with contextlib.suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(path)
    except ValueError as error:
        raise ConfigError(
            f"{path}: transformers refuses its generation_config.json ({first_line(error)})"
        ) from error
    return model.eval()


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Other name of a tied parameter -> its first name, which `named_parameters` gives."""
    first = {id(param): name for name, param in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(param)] for name, param in every if first[id(param)] != name}


def _compute_buffers(model: Any) -> None:
    for name, buffer in list(model.named_buffers()):
        set_buffer(model, name, torch.empty_like(buffer, device="cpu"))
    for param in model.parameters():
        param._is_hf_initialized = True  # otherwise transformers would initialize it randomly
    model.initialize_weights()


def _check_layers(model: Any) -> None:
    kinds = set(getattr(text_config(model.config), "layer_types", None) or ())
    kinds -= {"full_attention", "sliding_attention"}
    if linear_layers(model):
        kinds -= {LINEAR}
    if kinds:
        raise ConfigError(
            f"{type(model).__name__} cannot be trained packed: it has {', '.join(sorted(kinds))} layers. "
            "Choose another model"
        )


def _compile_layers(model: Any) -> None:
    """Compiles the modules whose shapes do not depend on the sequences, in place: names of parameters stay.

    Attention is left out, because its layout differs from batch to batch, and so are blocks of experts, whose
    shapes depend on the data.
    """
    with_router = {id(module) for module in routers(model)}
    for layer in decoder_layers(model):
        for child in layer.children():
            # Recognized by its class, because its name differs: `self_attn`, `attn`, `attention` or
            # `self_attention`.
            is_attention = "Attention" in type(child).__name__ or type(child).__name__ in LINEAR_CLASSES
            if not is_attention and not any(id(module) in with_router for module in child.modules()):
                child.compile(dynamic=True)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The model's stack of decoder layers.

    Raises ConfigError if there is no list of `num_hidden_layers` modules.
    """
    num_layers = getattr(text_config(model.config), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ConfigError(f"{type(model).__name__}: no list of {num_layers} decoder layers to shard")
