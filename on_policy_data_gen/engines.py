"""Which engine the arguments ask for."""

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from alignment.errors import UserError
from alignment.model.loading import check_attention

from .configs import PolicyArguments
from .sampling import Engine, Sampling


def check_engine(args: PolicyArguments) -> None:
    """Raises UserError for what cannot generate here, before anything is loaded."""
    processes = PartialState().num_processes
    if processes > 1 and (args.server or args.engine == "vllm"):
        what = "a server" if args.server else "vLLM"
        raise UserError(f"{processes} processes were launched, and {what} divides the work itself; start one")
    if not args.server and args.engine == "transformers":
        check_attention(args.attn_implementation, use_cpu=PartialState().device.type == "cpu")


def open_engine(args: PolicyArguments, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Engine:
    """The model, loaded and ready."""
    if args.server:
        from .server_client import ServerEngine

        return ServerEngine(args, sampling)
    if args.engine == "vllm":
        from .vllm_process import VLLMEngine

        return VLLMEngine(args, sampling)
    from .in_process import TransformersEngine

    return TransformersEngine.load(args, tokenizer, sampling, PartialState().device)
