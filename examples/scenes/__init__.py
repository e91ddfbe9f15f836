"""Text to image that needs distillation: composed scenes, drawn without end, with unseen pairs.

Every part is an ordinary one: MiniLM reads the captions, an AutoencoderKL and a
UNet2DConditionModel are trained here, and a StableDiffusionPipeline folder holds them. See
docs/scenes.md.
"""
