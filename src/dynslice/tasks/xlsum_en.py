"""ROUGE-L of a generated summary, for xlsum_en.yaml."""

from rouge_score.rouge_scorer import RougeScorer

_SCORER = RougeScorer(["rougeL"], use_stemmer=True)


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """F measure of the longest common subsequence of words, between 0 and 1."""
    return {"rougeL": _SCORER.score(doc["summary"], results[0])["rougeL"].fmeasure}
