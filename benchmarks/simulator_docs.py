"""Write the strong-scaling curve of docs/simulator.md again: python benchmarks/simulator_docs.py."""

from pathlib import Path

from llm_streamline.config import load_recipe
from llm_streamline.simulate.answer import scaling_row, simulate_run

DOCS = Path(__file__).parent.parent / "docs" / "simulator.md"
BEGIN, END = "<!-- curve: begin -->", "<!-- curve: end -->"
SIZES = [  # of Llama-2-7B's published config
    "num_hidden_layers=32", "hidden_size=4096", "intermediate_size=11008", "num_attention_heads=32",
    "num_key_value_heads=32", "vocab_size=32000", "max_position_embeddings=4096",
]  # fmt: skip
SETTINGS = {
    "target.layers": 8,
    "text.seq_len": 2048,
    "calibration.tokens": 1_048_576,
    "calibration.batch_tokens": 8192,
    "training.tokens": 100_000_000,
    "training.per_device_train_batch_size": 1,
    "training.gradient_accumulation_steps": 64,
    "evaluation.tokens": 16_384,
}


def curve() -> str:
    """Tables of 1 to 64 devices for two objectives, as markdown."""
    lines = []
    for objective in ("mse", "kl"):
        recipe = load_recipe(None, {**SETTINGS, "training.objective": objective})
        answer = simulate_run("llama", recipe, sizes=SIZES, rates="h100-sxm", scaling=True)
        lines += [
            f"Objective `{objective}`, {answer['rates']['name']}:",
            "",
            "| devices | whole run | speed-up | training | GB on a device |",
            "|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(scaling_row(row))} |" for row in answer["scaling"]]
        lines.append("")
    lines += ["Assumptions:", "", *(f"* {sentence}" for sentence in answer["assumptions"])]
    return "\n".join(lines)


def replaced(text: str, tables: str) -> str:
    """`text` with new tables between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


if __name__ == "__main__":
    DOCS.write_text(replaced(DOCS.read_text(encoding="utf-8"), curve()), encoding="utf-8")
