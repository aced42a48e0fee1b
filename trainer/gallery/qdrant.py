"""Upgrade of a Qdrant collection: a second collection next to it, and the alias that queries go through put over.

Ids, payloads, other vectors, payload indexes and the collection's settings are taken along as they are. The state is a
point of the collection ``lce_gallery``. Qdrant has no triggers: when all points are copied, both collections are
compared until a pass finds nothing new, changed or removed, and then the alias is moved. A second vector in the same
points is in :mod:`trainer.gallery.qdrant_vector`.
"""

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.gallery.convert import Converter, check_direction, usable
from trainer.gallery.files import Check, smallest_cosine

_STATES = "lce_gallery"
_SAME = 0.999  # cosine of a vector that was converted again to the stored one
_PASSES = 5


@dataclass(frozen=True)
class PointsState:
    """Where an upgrade stands: none, converting, swapped or finished. source, target: the collections; done: points
    that are copied; offset: the point that comes next; new_vector: the name of a second vector in the same points;
    made_from: the vector of which an upgrade under way makes this one."""

    phase: str = "none"
    version: str | None = None
    source: str = ""
    target: str = ""
    dim_in: int = 0
    dim_out: int = 0
    done: int = 0
    offset: int | str | None = None
    applied: tuple[str, ...] = ()
    new_vector: str = ""
    made_from: str = ""


class QdrantGallery:
    """The vectors of a collection.

    Args:
        address: of a server (``http://host:6333``; the key is taken from QDRANT_API_KEY), or a folder of the client's
            local mode.
        alias: the alias that the application queries. vector: the name of the vector, where the collection has names.

    Raises:
        DataError: no server, no such alias or vector, or no qdrant-client.
    """

    def __init__(self, address: str, alias: str, vector: str = "") -> None:
        try:
            import qdrant_client
            from qdrant_client.http.exceptions import ApiException
        except ImportError:
            raise DataError("a Qdrant gallery needs qdrant-client; pip install 'lce-trainer[gallery]'") from None
        self.name, self._alias, self._vector = f"{alias}.{vector}" if vector else alias, alias, vector
        self._models: Any = qdrant_client.models
        self._errors = (ApiException, ValueError, RuntimeError, OSError)
        with self._clear():
            if "://" in address:
                self._client: Any = qdrant_client.QdrantClient(url=address, api_key=os.environ.get("QDRANT_API_KEY"))
            elif Path(address).is_dir():
                self._client = qdrant_client.QdrantClient(path=address)
            else:
                raise DataError(f"{address}: no folder of Qdrant's local mode, and no address of a server")
            self.collection = self._resolve()
            self.dim = self._size(self.collection)

    def close(self) -> None:
        """Close the connection; a folder is free for others again."""
        self._client.close()

    @contextmanager
    def _clear(self) -> Iterator[None]:
        """What Qdrant or the network says is one clear error."""
        try:
            yield
        except self._errors as error:
            raise DataError(f"{self.name}: {' '.join(str(error).split())[:200]}; run again to continue") from None

    def _resolve(self) -> str:
        aliases = {a.alias_name: a.collection_name for a in self._client.get_aliases().aliases}
        if self._alias in aliases:
            return str(aliases[self._alias])
        if self._client.collection_exists(self._alias):
            raise DataError(
                f"{self._alias}: is a collection itself; make an alias of it (update_collection_aliases), let queries "
                "go through the alias, and give its name, so that it can be put over"
            )
        raise DataError(f"{self._alias}: no such alias in Qdrant; there are {sorted(aliases)}")

    def _size(self, collection: str) -> int:
        vectors = self._client.get_collection(collection).config.params.vectors
        named = isinstance(vectors, dict)
        if named != bool(self._vector) or (named and self._vector not in vectors):
            there = sorted(vectors) if named else "one vector without a name"
            raise DataError(f"{self.name}: the collection has {there}; name the vector with `vector`")
        params = vectors[self._vector] if named else vectors
        if params.multivector_config is not None:
            raise DataError(f"{self.name}: points have several vectors each (multivector); taken is one")
        return int(params.size)

    def _number(self, vector: str) -> str:
        name = f"{self._alias}.{vector}" if vector else self._alias
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"lce:{name}"))

    def _state(self) -> PointsState:
        """What is saved, but where the alias points counts: a call may have been killed after it put the alias over,
        and before it said so."""
        state = self._saved()
        if state.phase in ("converting", "swapped") and state.source != state.target:
            phase = {state.source: "converting", state.target: "swapped"}.get(self._resolve(), state.phase)
            state = replace(state, phase=phase)
        return state

    def _saved(self) -> PointsState:
        if not self._client.collection_exists(_STATES):
            return PointsState()
        found = self._client.retrieve(_STATES, [self._number(self._vector)])
        if not found:
            return PointsState()
        state = PointsState(**{**found[0].payload, "applied": tuple(found[0].payload["applied"])})
        if state.made_from:
            raise DataError(f"{self.name}: is being made of {state.made_from}; name that one with `vector`")
        return state

    def _save(self, state: PointsState, vector: str | None = None) -> None:
        """Keep a state; ``vector``: of another vector than this one."""
        if not self._client.collection_exists(_STATES):
            self._client.create_collection(_STATES, vectors_config={})
        tree = {**asdict(state), "applied": list(state.applied)}
        number = self._number(self._vector if vector is None else vector)
        self._client.upsert(_STATES, [self._models.PointStruct(id=number, vector={}, payload=tree)])

    def _forget(self, vector: str) -> None:
        self._client.delete(_STATES, points_selector=self._models.PointIdsList(points=[self._number(vector)]))

    def _save_rolled_back(self, state: PointsState) -> None:
        """The state before the upgrade ``state``: none, or what the upgrade before it left."""
        if state.applied:
            self._save(PointsState("finished", state.applied[-1], target=state.source, applied=state.applied[:-1]))
        else:
            self._forget(self._vector)

    def status(self) -> PointsState:
        """Where the upgrade stands."""
        with self._clear():
            return self._state()

    def _of(self, record: Any) -> Any:
        """The vector of a point; None: it has none."""
        return record.vector.get(self._vector) if isinstance(record.vector, dict) else record.vector

    def _converted(self, records: list[Any], converter: Converter) -> list[Any]:
        """Points (with their payload and other vectors) whose vector is the new one."""
        held = [record for record in records if self._of(record) is not None]
        new: dict[Any, list[float]] = {}
        if held:
            made = converter(*self._rows(held, converter))
            new = {record.id: vector.tolist() for record, vector in zip(held, made, strict=True)}
        points = []
        for record in records:
            vector = record.vector if record.vector is not None else {}
            if record.id in new:
                vector = {**vector, self._vector: new[record.id]} if self._vector else new[record.id]
            points.append(self._models.PointStruct(id=record.id, vector=vector, payload=record.payload))
        return points

    def _rows(self, records: list[Any], converter: Converter) -> tuple[IntArray, FloatArray]:
        numbered = all(isinstance(record.id, int) for record in records)
        if converter.by_id and not numbered:
            raise DataError(f"{self.name}: with images a point's id is the number of its picture; some are no numbers")
        ids = np.array([record.id for record in records], np.int64 if numbered else object)
        vectors = usable(np.array([self._of(record) for record in records], np.float32), ids, self.name)
        return ids, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _check(self, state: PointsState, converter: Converter) -> tuple[str, ...]:
        """Whether an upgrade may begin; the conversions before it. Raises :class:`DataError`."""
        through = (*state.applied, str(state.version)) if state.phase == "finished" else state.applied
        forget = f"delete the point {self._number(self._vector)} of the collection {_STATES}"
        check_direction(self.name, through, converter, forget)
        if self.dim != converter.dim_in:
            raise DataError(f"{self.name}: vectors of dimension {self.dim}, the conversion takes {converter.dim_in}")
        return through

    def _begin(self, state: PointsState, converter: Converter) -> PointsState:
        through = self._check(state, converter)
        mark = hashlib.sha256(converter.version.encode()).hexdigest()[:8]
        target = f"{self.collection}_lce_{mark}"
        state = PointsState(
            "converting", converter.version, self.collection, target, self.dim, converter.dim_out, applied=through
        )
        if self._client.collection_exists(target):
            raise DataError(f"{self.name}: the collection {target} is there without its upgrade; delete it")
        self._save(state)
        return state

    def _create(self, state: PointsState) -> None:
        """A collection with the settings of the old one and the new size."""
        info, models = self._client.get_collection(state.source), self._models
        params = info.config.params
        old = params.vectors[self._vector] if self._vector else params.vectors
        new = old.model_copy(update={"size": state.dim_out})
        names = ("shard_number", "replication_factor", "write_consistency_factor", "on_disk_payload")
        more = {name: getattr(params, name) for name in names if getattr(params, name, None) is not None}
        for name, kind in (("hnsw_config", models.HnswConfigDiff), ("optimizer_config", models.OptimizersConfigDiff)):
            if getattr(info.config, name, None) is not None:
                given = getattr(info.config, name).model_dump(exclude_none=True)
                more["optimizers_config" if name == "optimizer_config" else name] = kind(**given)
        if info.config.quantization_config is not None:
            more["quantization_config"] = info.config.quantization_config
        vectors = {**params.vectors, self._vector: new} if self._vector else new
        self._client.create_collection(
            state.target, vectors_config=vectors, sparse_vectors_config=params.sparse_vectors, **more
        )

    def _index(self, state: PointsState) -> None:
        """The payload indexes that the old collection has and the new one lacks."""
        old, new = (self._client.get_collection(name).payload_schema or {} for name in (state.source, state.target))
        for field, schema in old.items():
            if field not in new:
                self._client.create_payload_index(state.target, field, field_schema=schema.params or schema.data_type)

    def plan(self, converter: Converter, sample: int = 1000) -> dict[str, Any]:
        """Points, dimensions, and seconds estimated from a sample. Raises :class:`DataError`: it cannot be upgraded."""
        with self._clear():
            state = self._state()
            if state.phase in ("none", "finished"):
                self._check(state, converter)
            collection = self.collection if state.phase != "swapped" else state.source
            records = self._client.scroll(collection, limit=sample, with_vectors=True)[0]
            records = [record for record in records if self._of(record) is not None]
            if not records:
                raise DataError(f"{self.name}: no point has a vector; there is nothing to upgrade")
            start = time.perf_counter()
            converter(*self._rows(records, converter))
            count = self._client.count(collection).count
            seconds = (time.perf_counter() - start) / len(records) * count * 2  # converted, and compared
            return {
                "rows": count,
                "dim_in": converter.dim_in,
                "dim_out": converter.dim_out,
                "bytes_needed": count * converter.dim_out * 4,
                "seconds": seconds,
            }

    def _check_version(self, state: PointsState, converter: Converter) -> None:
        if state.phase in ("converting", "swapped") and state.version != converter.version:
            raise DataError(
                f"{self.name}: an upgrade to {state.version} is {state.phase}; finish it or roll it back first"
            )

    def upgrade(
        self,
        converter: Converter,
        *,
        batch: int = 1024,
        rows_per_second: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> PointsState:
        """Copy every point with its new vector, compare, and put the alias over; goes on where it was interrupted.

        Raises:
            DataError: an upgrade to another version is under way or done, this one was finished before, vectors of
                another dimension, or points change faster than they are compared.
        """
        with self._clear():
            state = self._state()
            self._check_version(state, converter)
            if state.phase == "swapped":
                self._save(state)
                return state
            if state.phase != "converting":
                state = self._begin(state, converter)
            if not self._client.collection_exists(state.target):
                self._create(state)
            self._index(state)
            total = self._client.count(state.source).count
            began, first = time.perf_counter(), state.done
            while state.done == 0 or state.offset is not None:
                records, offset = self._client.scroll(
                    state.source, limit=batch, offset=state.offset, with_vectors=True, with_payload=True
                )
                if records:
                    self._client.upsert(state.target, self._converted(records, converter))
                state = replace(state, done=state.done + len(records), offset=offset)
                self._save(state)
                self._check_pace(state.done, total, batch)
                if progress is not None:
                    progress(state.done, max(total, state.done))
                if rows_per_second is not None:
                    time.sleep(max(0.0, (state.done - first) / rows_per_second - (time.perf_counter() - began)))
                if not records:
                    break
            for _ in range(_PASSES):
                if self._compare(state, converter, batch) == 0:
                    break
            else:
                raise DataError(f"{self.name}: points change faster than they are compared; stop writers, run again")
            self._point(state.target)
            state = replace(state, phase="swapped", done=self._client.count(state.target).count)
            self._save(state)
            return state

    def _batches(self, collection: str, batch: int, vectors: bool, where: Any = None) -> Iterator[list[Any]]:
        offset, seen, total = None, 0, self._client.count(collection).count
        while True:
            records, offset = self._client.scroll(
                collection, where, limit=batch, offset=offset, with_vectors=vectors, with_payload=vectors
            )
            seen += len(records)
            self._check_pace(seen, total, batch)
            if records:
                yield records
            if offset is None:
                return

    def _check_pace(self, seen: int, total: int, batch: int) -> None:
        """Points are read in the order of their ids, so that writers who append could keep a reader for ever."""
        if seen > 2 * total + batch:
            raise DataError(f"{self.name}: points come faster than they are read; stop writers, run again")

    def _compare(self, state: PointsState, converter: Converter, batch: int) -> int:
        """Bring the target up to what the source is now; how many points differed."""
        changed = 0
        for records in self._batches(state.source, batch, vectors=True):
            there = self._client.retrieve(
                state.target, [record.id for record in records], with_vectors=True, with_payload=True
            )
            now = {record.id: record for record in there}
            wanted = self._converted(records, converter)
            stale = [point for point in wanted if not self._equal(point, now.get(point.id))]
            if stale:
                self._client.upsert(state.target, stale)
            changed += len(stale)
        for records in self._batches(state.target, batch, vectors=False):
            ids = [record.id for record in records]
            left = {record.id for record in self._client.retrieve(state.source, ids, with_payload=False)}
            if gone := [number for number in ids if number not in left]:
                self._client.delete(state.target, points_selector=self._models.PointIdsList(points=gone))
                changed += len(gone)
        return changed

    def _equal(self, point: Any, record: Any) -> bool:
        if record is None or (record.payload or {}) != (point.payload or {}):
            return False
        one, two = self._of(point), self._of(record)
        if one is None or two is None:
            return one is two
        return smallest_cosine(np.array([one], np.float32), np.array([two], np.float32)) >= _SAME

    def _point(self, collection: str) -> None:
        """Put the alias over, in one step."""
        models = self._models
        self._client.update_collection_aliases(
            [
                models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=self._alias)),
                models.CreateAliasOperation(
                    create_alias=models.CreateAlias(collection_name=collection, alias_name=self._alias)
                ),
            ]
        )

    def verify(self, converter: Converter, sample: int = 1000, seed: int = 0) -> Check:
        """Re-compute random points of the old collection and compare with the new one. Raises :class:`DataError`."""
        with self._clear():
            state = self._state()
            if state.phase != "swapped" or state.version != converter.version:
                raise DataError(f"{self.name}: is not upgraded to {converter.version} ({state.phase})")
            ids = [record.id for records in self._batches(state.source, 4096, False) for record in records]
            chosen = [ids[at] for at in np.random.default_rng(seed).permutation(len(ids))[:sample]]
            old = [r for r in self._client.retrieve(state.source, chosen, with_vectors=True) if self._of(r) is not None]
            new = {r.id: self._of(r) for r in self._client.retrieve(state.target, chosen, with_vectors=True)}
            both = [record for record in old if new.get(record.id) is not None]
            made = converter(*self._rows(both, converter))
            stored = np.array([new[record.id] for record in both], np.float32)
            counts = (self._client.count(state.source).count, self._client.count(state.target).count)
            return Check(
                len(both),
                smallest_cosine(made, stored),
                rows_before=counts[0],
                rows_now=counts[1],
                missing=len(old) - len(both),
            )

    def sample(self, count: int, seed: int = 0) -> tuple[IntArray, list[FloatArray]]:
        """Ids (row numbers where they are none) and stored vectors of random points behind the alias."""
        return self._sample(self._vector, count, seed)

    def _sample(self, vector: str, count: int, seed: int) -> tuple[IntArray, list[FloatArray]]:
        with self._clear():
            ids = [record.id for records in self._batches(self.collection, 4096, False) for record in records]
            chosen = [ids[at] for at in np.random.default_rng(seed).permutation(len(ids))[:count]]
            records = self._client.retrieve(self.collection, chosen, with_vectors=True, with_payload=False)
        held = [(r.id, r.vector.get(vector) if isinstance(r.vector, dict) else r.vector) for r in records]
        held = [(number, row) for number, row in held if row]
        numbered = all(isinstance(number, int) for number, _ in held)
        numbers = np.array([number for number, _ in held], np.int64) if numbered else np.full(len(held), -1)
        return numbers, [np.asarray(row, np.float32) for _, row in held]

    def rollback(self) -> None:
        """The alias points at the old collection again, and the new one is deleted.

        Raises:
            DataError: no upgrade, or points that were enrolled after the swap.
        """
        with self._clear():
            state, saved = self._state(), self._saved()
            if state.phase not in ("converting", "swapped"):
                raise DataError(f"{self.name}: has no upgrade to roll back")
            if "swapped" in (state.phase, saved.phase) and self._client.collection_exists(state.target):
                for records in self._batches(state.target, 4096, False):
                    ids = [record.id for record in records]
                    known = {r.id for r in self._client.retrieve(state.source, ids, with_payload=False)}
                    if new := [number for number in ids if number not in known]:
                        raise DataError(
                            f"{self.name}: points were enrolled after the swap ({new[0]} and {len(new) - 1} more) and "
                            f"have no old vector; put them into {state.source} or delete them first"
                        )
                self._point(state.source)
            self._client.delete_collection(state.target)
            self._save_rolled_back(state)

    def finish(self) -> None:
        """Delete the old collection: there is no way back. Raises :class:`DataError`: it is not upgraded."""
        with self._clear():
            state = self._state()
            if state.phase not in ("swapped", "finished"):
                raise DataError(f"{self.name}: is not upgraded ({state.phase}); there is nothing to finish")
            self._save(replace(state, phase="finished"))  # first: a cut one is finished by running it again
            if state.source and state.source != self._resolve():
                self._client.delete_collection(state.source)
