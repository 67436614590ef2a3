"""Turn every image of an archive into a vector: the features by which a pretrained model tells its classes.

nightshift embed photos/ -o vectors/ --model resnet50                      2,048 numbers an image, on this machine
nightshift embed photos/ -o vectors/ --normalize --embedding-dtype float16  half the size, ready for cosine similarity
nightshift embed photos/ -o vectors/ --address 10.0.0.1:6379               an archive, on a Ray cluster

inputs ─ list ─ plan ─ shards ═ Ray Data ═ worker: fetch → decode → features → commit ═ status rows ─ run.json
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final

import psutil
import tyro

from jobs.archive import SHARED_IDENTITY, ArchiveConfig, run_archive
from jobs.cli import leave, parse, run_command
from jobs.forecast import describe_forecast
from jobs.inputs import Check
from jobs.result import ArchiveResult, describe_result
from pipeline.schema import EMBEDDINGS_DIR, EmbeddingType, Parts, embedding_parts
from pipeline.terminal import quote_for_shell, quote_for_sql

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.answers import Embeddings
    from pipeline.models import Model

# What a row takes in a part of 400 photographs, compressed, which saves a tenth of what the features themselves are.
BYTES_PER_NUMBER: Final[dict[str, float]] = {"float32": 3.6, "float16": 1.8}
BYTES_PER_ROW: Final = 30


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ArchiveConfig):
    """Settings of an embedding job: its Python API, its YAML file and its flags."""

    job: ClassVar[str] = "embed"
    yields: ClassVar[str] = "embeddings"
    outcome: ClassVar[str] = "embedded"
    directory: ClassVar[str] = EMBEDDINGS_DIR

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "resnet50"
    """A torchvision classifier, `module:factory`, or a model directory; an image's vector is what the last Linear or
    Conv2d of the network is given, averaged over its area where that is a map."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """The folder for the result."""

    # Embeddings
    normalize: bool = False
    """Divide each vector by its length, so that the product of two is the cosine of their angle."""
    embedding_dtype: EmbeddingType = "float32"
    """What the numbers of a vector are stored as; float16 takes half the space, and has three decimal digits."""

    def open_model(self) -> Model:
        return self.load_model(needs_names=False)

    def open_answer(self, model: Model) -> Embeddings:
        from pipeline.answers import Embeddings
        from pipeline.models import find_features

        return Embeddings(tap=find_features(model), dtype=self.embedding_dtype, is_normalised=self.normalize)

    def describe_model(self, model: Model, answer: Embeddings) -> dict[str, Any]:
        known = model.describe()  # of which the names of its classes do not matter
        fixed = {name: known[name] for name in ("sha256", "architecture", "arguments")}
        return {**fixed, "layer": answer.tap.layer, "dimensions": answer.tap.dimensions}

    def describe_parts(self, resolved: dict[str, Any]) -> Parts:
        return embedding_parts(resolved["fixed"]["dimensions"], resolved["embedding_dtype"])

    def count_bytes(self) -> float:
        from pipeline.models import count_features

        dimensions = count_features(self.model, weights=self.weights, overrides=self.overrides)
        return BYTES_PER_ROW + BYTES_PER_NUMBER[self.embedding_dtype] * dimensions

    @property
    def identity_names(self) -> list[str]:
        return ["normalize", "embedding_dtype", *SHARED_IDENTITY]

    def _find_faults(self) -> Iterator[Check]:
        yield self.output is None and not (self.dry_run or self.verify), "-o: name a folder for the embeddings"
        yield from super()._find_faults()


@dataclass(frozen=True, kw_only=True)
class EmbedResult(ArchiveResult):
    """Where the embeddings of a run are, and how it went.

    The rows of `dataset()` have the columns uri, embedding (a fixed-size list of float32 or float16), width and height
    in pixels, size_bytes, target, error_stage, error, attempts, model and run_id. Of an image that failed, `error` says
    why, and embedding is null.
    """

    directory: ClassVar[str] = EMBEDDINGS_DIR

    @property
    def embeddings(self) -> str:
        """The folder of the parts."""
        return self.parts

    @property
    def dimensions(self) -> int:
        """Numbers of a vector."""
        dimensions: int = self.account["config"]["resolved"]["fixed"]["dimensions"]
        return dimensions

    def read_vectors(self) -> tuple[list[str], NDArray[np.floating[Any]]]:
        """The URIs of all N images that did not fail, and their vectors, (N, D) float32 or float16, in memory."""
        import pyarrow.compute as pc

        rows = self.dataset().to_table(columns=["uri", "embedding"], filter=pc.field("error").is_null())
        vectors = rows["embedding"].combine_chunks()
        matrix: NDArray[np.floating[Any]] = vectors.flatten().to_numpy().reshape(len(rows), self.dimensions)
        return rows["uri"].to_pylist(), matrix


def run(config: EmbedConfig, *, started: float | None = None) -> EmbedResult:
    """Embed all images of `config.inputs` into `config.output`, or continue where an earlier run ended.

    It runs on the Ray that this process is connected to, or else on the one at `config.address`, or one of its own.

    Args:
        config: the settings; `output` has to be among them.
        started: when the user asked for it, in seconds since 1970, for the account of the run; by default, now.

    Raises:
        UsageError: the command cannot be carried out; `faults` has all the reasons, and nothing was started.
        ClusterError: no Ray can be reached or started.
        PipelineError: the run failed, or was stopped; what was committed is kept, and the same call goes on.
    """
    outcome = run_archive(config, started=started)
    return EmbedResult(output=str(config.output), account=outcome.account, exit_code=outcome.exit_code)


def describe(result: EmbedResult, config: EmbedConfig) -> str:
    """The result in the words of a person."""
    dtype = result.account["config"]["resolved"]["embedding_dtype"]
    query = f"SELECT uri, embedding FROM {quote_for_sql(result.embeddings)} WHERE error IS NULL"
    lines = [
        *describe_result(result, config),
        f"vectors  {result.embeddings}, of {result.dimensions:,} numbers each ({dtype})",
        f"read it  duckdb -c {quote_for_shell(query)}",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command `nightshift embed`."""
    purpose = "Turn the images of an archive into vectors, the features of a pretrained model, in Parquet."
    config = parse(EmbedConfig, arguments, command="embed", description=purpose)
    if config.dry_run:
        config.check()
        print(describe_forecast(config))
        return 0
    result = run(config, started=psutil.Process().create_time())
    print(jsonlib.dumps(result.account, indent=2) if config.json else describe(result, config))
    return result.exit_code


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
