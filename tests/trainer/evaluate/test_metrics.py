"""What each metric gives for answers and positions whose value is known by hand or published."""

import numpy as np
import pytest

from trainer.evaluate import metrics


def test_rouge_takes_accents_and_enye_for_letters_where_the_papers_does_not():
    answer, target = "El niño mañana", "el niño MAÑANA"
    assert metrics.WordTokenizer().tokenize("¿Dónde está el nin\u0303o?") == ["dónde", "está", "el", "niño"]
    assert metrics.rouge_l(answer, target) == 1 and metrics.rouge_l("El nino manana", target) == pytest.approx(1 / 3)
    # ASCII words: niño is "ni" and "o", año "a" and "o". They share a word that neither has.
    assert metrics.rouge_l("año", "niño") == 0 and metrics.rouge_l_of_the_paper("año", "niño") == pytest.approx(0.5)


def test_rouge_knows_the_script_that_ascii_words_lose_whole():
    assert (
        metrics.rouge_l("привет мир", "привет мир") == 1
        and metrics.rouge_l_of_the_paper("привет мир", "привет мир") == 0
    )


def test_pass_at_k_is_the_chance_that_a_draw_of_k_holds_a_right_one():
    assert metrics.pass_at_k(4, 0, 2) == 0 and metrics.pass_at_k(4, 4, 1) == 1
    assert metrics.pass_at_k(4, 1, 1) == 0.25 and metrics.pass_at_k(4, 1, 2) == 0.5 and metrics.pass_at_k(4, 2, 3) == 1
    with pytest.raises(ValueError):
        metrics.pass_at_k(2, 1, 3)


def test_exact_leaves_composition_and_white_space_aside():
    assert metrics.exact("nin\u0303o\n come", "niño come ") == 1 and metrics.exact("niño", "nino") == 0


def test_ece_is_the_gap_between_confidence_and_being_right():
    confidence, right = np.array([0.9, 0.9, 0.9, 0.1]), np.array([1.0, 1.0, 0.0, 0.0])
    bins = metrics.bin_of(confidence)
    sums = {
        "confident": np.bincount(bins, confidence, metrics.BINS),
        "right": np.bincount(bins, right, metrics.BINS),
        "tokens": np.float64(4),
    }
    assert metrics.values(sums)["ece"] == pytest.approx((abs(2.7 - 2) + 0.1) / 4)
    assert metrics.bin_of(np.array([0.0, 1.0])).tolist() == [0, metrics.BINS - 1]


@pytest.mark.parametrize(
    "answer, target, beta, published",
    [  # sacrebleu's own test cases, which it gives in percent
        ("a", "a", 3, 100.0),
        ("", "reference", 3, 0.0),
        ("a b c", "abc", 3, 100.0),
        ("", "c", 3, 0.0),
        ("aa", "ab", 3, 25.0),
        (
            " risk assessment must be made of those who are qualified and expertise in the sector - these are the scientists .",
            "risk assessment has to be undertaken by those who are qualified and expert in that area - that is the scientists .",
            3,
            63.361730,
        ),
        (
            " Die    Beziehung zwischen  Obama und Netanjahu ist nicht gerade  freundlich. ",
            "Das Verhältnis zwischen Obama und Netanyahu ist nicht gerade freundschaftlich.",
            3,
            64.1302698,
        ),
        (
            "Co nás nejvíc trápí, protože lékaři si vybírají, kdo bude žít a kdo zemře.",
            "Nejvíce smutní jsme z toho, že musíme rozhodovat o tom, kdo bude žít a kdo zemře.",
            2,
            39.14078509,
        ),
    ],
)
def test_chrf_is_what_sacrebleu_published(answer, target, beta, published):
    assert 100 * metrics.chrf(answer, target, beta) == pytest.approx(published, abs=1e-4)


def test_chrf_weighs_recall_over_precision():
    # Both texts reach one order only, 1: precision 1/2 and recall 1, and then the other way round.
    assert metrics.chrf("ab", "a") == pytest.approx(5 * 0.5 * 1 / (4 * 0.5 + 1))
    assert metrics.chrf("a", "ab") == pytest.approx(5 * 1 * 0.5 / (4 * 1 + 0.5))


def test_chrf_is_measured_on_every_answer_and_takes_the_best_reference():
    attempt = metrics.Attempt("ab", "ab", ((None, "x"), (None, "ab")), None)
    assert metrics.ANSWER_METRICS["chrF"](attempt) == 1
    assert metrics.ANSWER_METRICS["chrF"](metrics.Attempt("ab", "ab", ((None, None),), None)) is None
