"""What can be wrong, each with what came, what was expected and what to do."""


class DiffguideError(Exception):
    """Base of every error that a caller may have caused and can mend."""


class ParamError(DiffguideError):
    """A parameter of a method is unknown or outside its range."""


class LayoutError(DiffguideError):
    """A layout or one of its regions is malformed; the message names the field."""


class PromptError(DiffguideError):
    """A phrase is not in the prompt, or was cut off by the tokenizer's length."""


class FamilyError(DiffguideError):
    """No family describes this pipeline, or the family cannot serve what is asked."""


class AttachError(DiffguideError):
    """A combination of pipeline, state and methods cannot be honoured; the message says how to mend it."""


class SteeringError(DiffguideError):
    """Something met during a run would make steering silently wrong."""


class RecipeError(DiffguideError):
    """A recipe, or a picture that should carry one, cannot be read."""


class ModelError(DiffguideError):
    """A model cannot be found, read or trusted."""


class SearchError(DiffguideError):
    """A search cannot go on: its state cannot be kept or is that of another one, or its workers fail."""


class OutputError(DiffguideError):
    """An output cannot be written."""


class KernelError(DiffguideError):
    """Options of attention that do not fit its tensors, or that no route (or not the named one) can honour."""
