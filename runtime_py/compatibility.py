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

    Outputs are the same in the same order, as the columns of a raw answer have no other name. Rows, precisions and graphs
    may change, and tables may grow. A table may shrink only where both have a vocabulary for it: ids then come from there.
    """
    problems = [*_compare_features(serving, candidate), *_compare_outputs(serving, candidate)]
    had = {vocabulary.table for vocabulary in serving.vocabularies}
    has = {vocabulary.table for vocabulary in candidate.vocabularies}
    problems += [f"table '{table}' has no vocabulary, it has one as served" for table in sorted(had - has)]
    for table in serving.tables:
        other = candidate.table.get(table.name)
        if other is not None and table.name not in had & has and other.num_embeddings < table.num_embeddings:
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


def _compare_outputs(serving: Manifest, candidate: Manifest) -> list[str]:
    keys = [output.key for output in serving.outputs]
    others = [output.key for output in candidate.outputs]
    if keys != others:
        return [f"outputs are {', '.join(others)}; {', '.join(keys)} as served"]
    return [
        f"output '{output.key}' has dim {other.dim}, {output.dim} as served"
        for output, other in zip(serving.outputs, candidate.outputs, strict=True)
        if other.dim != output.dim
    ]
