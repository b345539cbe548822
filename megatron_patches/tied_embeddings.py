"""Input and output embeddings that are one weight but lie on the first and the last pipeline stage."""

from .patch import FunctionEdit, SourcePatch

TIED_EMBEDDINGS = SourcePatch(
    name="tied_embeddings",
    why="the last stage's copy of the embedding is moved by `.cuda()` before the two are made equal",
    edits=(
        FunctionEdit(
            "megatron.core.models.common.language_module.language_module",
            "LanguageModule.setup_embeddings_and_output_layer",
            # device_proxy makes current_device() the CPU
            (("weight.data = weight.data.cuda()", "weight.data = weight.data.to(torch.cuda.current_device())"),),
        ),
    ),
)
