"""The embedded models: one file each, with what it is built of, its loss and its pipeline."""

from diffguide.zoo.denoiser import Denoiser
from diffguide.zoo.denoisers.shapes_mmdit import ShapesMMDiT
from diffguide.zoo.denoisers.shapes_unet import ShapesUNet

DENOISERS: dict[str, type[Denoiser]] = {"shapes-unet": ShapesUNet, "shapes-mmdit": ShapesMMDiT}
