"""What the production runs share: sources, mix and settings of the paper."""

# Llama 3 paper, section 3.1.2: the final mix.
MIX = {"general": 0.50, "math": 0.25, "code": 0.17, "multilingual": 0.08}


def sources(directory: str) -> dict[str, dict[str, str]]:
    """Corpora written by `llama3_jax.tokenize` under `directory`, one folder a source."""
    return {
        name: {
            "train": f"{directory}/{name}/train",
            "validation": f"{directory}/{name}/validation",
        }
        for name in MIX
    }
