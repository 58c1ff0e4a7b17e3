"""GRPO of the real SmolLM2 on answers to small sums that the real vLLM sampled: a short run of the benchmark."""

import json

import pytest

pytestmark = pytest.mark.integration


def test_grpo_learns_from_sums_that_the_teacher_gets_right_sometimes(kd, tmp_path):
    with open(tmp_path / "sums.jsonl", "w") as file:
        for a in range(1, 6):
            for b in range(1, 6):
                row = {
                    "id": f"{a}+{b}",
                    "prompt": f"What is {a} + {b}? Answer with the number only.",
                    "completion": str(a + b),
                }
                file.write(json.dumps(row | {"verifier": {"kind": "numeric", "answer": str(a + b)}}) + "\n")
    kd(
        *(
            "cache-teacher",
            "--examples",
            tmp_path / "sums.jsonl",
            "--mode",
            "both",
            "--samples",
            4,
            "--temperature",
            0.8,
        ),
        *("--max-tokens", 12, "--out", tmp_path / "c"),
    )
    command = (
        *(
            "grpo",
            "--from-cache",
            tmp_path / "c",
            "--student",
            "embedded",
            "--output-dir",
            tmp_path / "r",
            "--temperature",
            0.8,
        ),
        *(
            "--num-generations",
            4,
            "--per-device-train-batch-size",
            8,
            "--max-completion-length",
            12,
            "--guide",
            "prefix",
        ),
    )
    assert json.loads(kd(*command, "--dry-run", "--json").stdout)["where"] == "success > 0 AND success < 1"
    done = kd(*command, "--max-steps", 2, "--learning-rate", 1e-5)
    lines = json.loads((tmp_path / "r" / "trainer_state.json").read_text())["log_history"]
    assert "step 2/2" in done.stderr and any(line.get("reward_std", 0) > 0 for line in lines)
    assert any(line.get("grad_norm", 0) > 0 for line in lines)
    assert (tmp_path / "r" / "model.safetensors").is_file()
