"""The networks of a study: the dense model, and slices of it."""

from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dynslice.core import files, paths
from dynslice.core.tensors import free_memory, pick_dtype
from dynslice.experiment.profile import Profile
from dynslice.extensions.compensation import Compensation
from dynslice.inputs import models
from dynslice.method import slicing, streaming
from dynslice.method.plan import SlicePlan
from dynslice.method.slicing import Sliced

GIB = 2**30


class Networks:
    """Dense and sliced network by the placement of a profile.

    resident: both are on the device. streamed and spread: one at a time is in memory, and slicing
    reads the dense one from its checkpoint layer by layer; spread lets accelerate place the one
    over all GPUs.
    """

    def __init__(self, settings: Profile, device: torch.device):
        self.settings = settings
        self.device = device
        self.dtype = pick_dtype(settings.dtype, device)
        self._dense: PreTrainedModel | None = None
        self._files = ExitStack()

    @property
    def resident(self) -> bool:
        """Whether dense and sliced network are in memory together."""
        return self.settings.placement == "resident"

    @cached_property
    def commit(self) -> str | None:
        """The commit that a hub model is read at."""
        return models.commit_of(self.settings.model, self.settings.model_revision)

    @property
    def revision(self) -> str | None:
        """What to load, now and later in a run: the commit, where there is one."""
        return self.commit or self.settings.model_revision

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config of the dense model."""
        return models.load_config(self.settings.model, self.revision)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which the slices share."""
        return models.load_tokenizer(self.settings.model, self.revision)

    @property
    def dense(self) -> PreTrainedModel:
        """The dense model, loaded when it is not there."""
        if self._dense is None:
            self._dense = self._load(self.settings.model, self.revision)
        return self._dense

    def slice(
        self, windows: Tensor, plan: SlicePlan, compensation: Compensation | None = None
    ) -> Sliced:
        """A slice of the dense model, calibrated on token windows [n, T]."""
        if self.resident:
            return slicing.slice_model(self.dense, windows, plan, compensation)
        self._dense = None
        free_memory()
        # Its files stay until the next slice: accelerate may read weights from them.
        self._files.close()
        folder = self._files.enter_context(files.scratch(paths.CACHE / "sliced"))
        source = (self.settings.model, windows, plan, self.device, self.dtype, self.revision)
        outcome = models.slice_saved(folder, *source, budget=self._budget(), start=compensation)
        return replace(outcome, model=self._load(str(folder)))

    def _budget(self) -> streaming.Budget:
        given = self.settings.device_memory_gib, self.settings.host_memory_gib
        return streaming.Budget(*(None if gib is None else int(gib * GIB) for gib in given))

    def _load(self, name: str, revision: str | None = None) -> PreTrainedModel:
        spread = self.settings.placement == "spread"
        return models.load(name, self.device, self.dtype, revision, spread)[0]
