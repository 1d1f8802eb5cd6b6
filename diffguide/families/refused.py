"""Denoisers that are known and refused, each with the reason."""

REFUSED = {
    "LTX2VideoTransformer3DModel": "LTX-2 guides video and sound in a space of its own, where neither a term nor a "
    "move arrives as it was meant; use LTX-Video (LTXPipeline)",
    "CosmosTransformer3DModel": "Cosmos steps its scheduler twice in every iteration, so that a step cannot be told "
    "from the next; use Wan or HunyuanVideo",
    "AceStepTransformer1DModel": "ACE-Step draws sound, which has no places, under a normalised guidance",
}
