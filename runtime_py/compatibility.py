"""May a new version take the place of the one that serves, for callers that were written for the old one?"""

from runtime_py.errors import IncompatibleError
from runtime_py.manifest import Manifest

__all__ = ["check_compatible", "find_differences"]


def check_compatible(serving: Manifest, candidate: Manifest) -> None:
    """Compares what callers count on, as `find_differences`.

    Raises:
        IncompatibleError: naming every difference.
    """
    problems = find_differences(serving, candidate)
    if problems:
        raise IncompatibleError(
            f"{'; '.join(problems)}; callers count on what is served: publish to another root, "
            "or load with allow_signature_change=True"
        )


def find_differences(serving: Manifest, candidate: Manifest) -> list[str]:
    """In what a candidate fails callers: features, outputs, vocabularies, and that an id which is valid stays so.

    Rows, precisions and graphs may change, tables may grow, and outputs may follow those that are served. A table may
    shrink only where the candidate has a vocabulary for it, since ids then come from there.
    """
    problems = _compare_features(serving, candidate)
    for output in serving.outputs:
        dims = [other.dim for other in candidate.outputs if other.key == output.key]
        if not dims:
            problems.append(f"output '{output.key}' is missing")
        elif dims != [output.dim]:
            problems.append(f"output '{output.key}' has dim {dims[0]}, {output.dim} as served")
    if (
        not problems and candidate.outputs[: len(serving.outputs)] != serving.outputs
    ):  # columns are found by their place
        served, others = (", ".join(output.key for output in each.outputs) for each in (serving, candidate))
        problems.append(f"outputs are {others}; {served} as served")
    has = {vocabulary.table for vocabulary in candidate.vocabularies}
    for vocabulary in serving.vocabularies:
        if vocabulary.table not in has:
            problems.append(f"table '{vocabulary.table}' has no vocabulary, it has one as served")
    for table in serving.tables:
        other = candidate.table.get(table.name)
        if other is not None and table.name not in has and other.num_embeddings < table.num_embeddings:
            problems.append(f"table '{table.name}' has {other.num_embeddings} rows, {table.num_embeddings} as served")
    return problems


def _compare_features(serving: Manifest, candidate: Manifest) -> list[str]:
    names = [feature.name for feature in serving.features]
    others = [feature.name for feature in candidate.features]
    if names != others:
        return [f"features are {', '.join(others)}; {', '.join(names)} as served"]
    problems = []
    for feature, other in zip(serving.features, candidate.features, strict=True):
        if other.table != feature.table:
            problems.append(f"feature '{feature.name}' reads table '{other.table}', '{feature.table}' as served")
        if other.pooling != feature.pooling:
            problems.append(f"feature '{feature.name}' pools by {other.pooling}, by {feature.pooling} as served")
        if other.weighted != feature.weighted:
            takes = {True: "takes weights", False: "takes no weights"}
            problems.append(f"feature '{feature.name}' {takes[other.weighted]}, it {takes[feature.weighted]} as served")
    return problems
