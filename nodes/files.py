"""Embeddings that are kept and shared."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..kernels import embedding_file
from . import queue, types
from .host import embedding_files
from .host.versions import schema


class SaveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDASaveEmbedding",
            display_name="Save Embedding",
            description="Keep a semantic embedding as a small file in the output folder, with the workflow that made it: drop "
            "the file on the page to open it. 128 tokens of FLUX.1 take 1 MiB.",
            search_aliases=["export embedding", "share", "store"],
            inputs=[
                types.Embedding.Input("embedding", tooltip="The embedding to keep."),
                io.String.Input(
                    "filename_prefix",
                    default="embeddings/embedding",
                    tooltip="Folder and name inside the output folder; a number is added. Takes %year% and the like, as Save "
                    "Image does.",
                ),
                io.Image.Input("image", optional=True, tooltip="A picture of it, kept in the file as a thumbnail."),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None) -> bool | str:
        return queue.verdict((embedding_files.check_prefix, filename_prefix))

    @classmethod
    def execute(cls, embedding, filename_prefix, image=None) -> io.NodeOutput:
        return io.NodeOutput(ui=ui.PreviewText(embedding_files.save(embedding, filename_prefix, image, cls.hidden)))


class LoadEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDALoadEmbedding",
            display_name="Load Embedding",
            description="Load an embedding that Save Embedding wrote.",
            search_aliases=["import embedding", "open embedding"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=embedding_files.files(),
                    tooltip="A file in ComfyUI's input folder, or one in its output folder, which is marked [output].",
                )
            ],
            outputs=[
                types.Embedding.Output(display_name="embedding", tooltip="The embedding as it was saved."),
                io.Image.Output(display_name="thumbnail", tooltip="The picture that was saved with it, grey if there is none."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return queue.verdict((lambda name: embedding_file.check(embedding_files.find(name)), file))

    @classmethod
    def fingerprint_inputs(cls, file=None) -> str:
        return embedding_files.fingerprint(file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(*embedding_files.load(file))
