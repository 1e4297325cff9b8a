"""Semantic Diffusion Adapter: the entry point that ComfyUI calls, nothing else."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    # Imported here, not above: `training` and the tests use this package without ComfyUI.
    from .nodes import SemanticDiffusionExtension

    return SemanticDiffusionExtension()
