"""lmms-eval's tasks, whose data are read once in a process: every row of a table asks about them.

Importing this imports lmms-eval.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmms_eval.api.task import ConfigurableTask

_KEPT: dict[str, tuple[Any, Any, Any]] = {}  # task -> state of its files, documents, without images


class ReadOnceTask(ConfigurableTask):
    """A task with the documents that an earlier one of its name read, if the files are the same.

    It runs its own modules anew and has requests and counts of its own.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """As lmms-eval makes a task of a class of its own.

        Args:
            config: the task's YAML, `class`, this one, and what is ours: `model_name`; `state`,
                that tells one state of the files from another; `only`, column and value of the
                documents to keep, None for all.
        """
        config = dict(config)
        del config["class"]
        self.state, self.only, name = (config.pop(key) for key in ("state", "only", "model_name"))
        super().__init__(config=config, model_name=name)

    def download(self, dataset_kwargs: Any = None) -> None:
        """Set `dataset` and `dataset_no_image`."""
        state, *kept = _KEPT.get(self.config.task, (None, None, None))
        if state == self.state:
            self.dataset, self.dataset_no_image = kept
            return
        super().download(dataset_kwargs)
        if self.only is not None:
            self._leave(*self.only)
        _KEPT[self.config.task] = self.state, self.dataset, self.dataset_no_image

    def _leave(self, column: str, value: Any) -> None:
        """Documents of one kind."""
        split = self.config.test_split
        for sets in (self.dataset, self.dataset_no_image):
            sets[split] = sets[split].filter(lambda found: found == value, input_columns=[column])
