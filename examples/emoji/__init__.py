"""Text to image from nothing: train a small latent diffusion pipeline, distil it, measure it.

Every part is an ordinary one: a byte-pair tokenizer, CLIPTextModel, AutoencoderKL and
UNet2DConditionModel, in a StableDiffusionPipeline folder. See docs/emoji.md.
"""
