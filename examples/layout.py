"""Put things where you want them, in a pipeline of your own. Here: the embedded model, unguided and guided."""

from diffusers import StableDiffusionPipeline

import diffguide as dg

pipe = StableDiffusionPipeline.from_pretrained(dg.zoo.path("shapes-unet"))
prompt = "a red circle and a blue square on a white background"
layout = dg.Layout(
    dg.Region("red circle", box=(0.05, 0.35, 0.45, 0.75)),
    dg.Region("blue square", box=(0.55, 0.05, 0.95, 0.45)),
)


def draw(name, steps=30):
    import torch

    image = pipe(
        prompt, num_inference_steps=steps, guidance_scale=4.0, generator=torch.Generator().manual_seed(1)
    ).images[0]
    image.save(name)


draw("unguided.png")
with dg.Guide(pipe, dg.Bacon(layout)) as guide:
    print(guide.explain(steps=30))
    draw("guided.png")
print(guide.report)
