"""Upgrade of a Qdrant collection by a second named vector in the same points, next to the old one.

Needs less than a second collection (no copies of payloads), and queries of both models can be answered at once. Which
points are left is what Qdrant itself says: those that have the old vector and not the new one.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.gallery.convert import Converter
from trainer.gallery.files import Check, smallest_cosine
from trainer.gallery.qdrant import PointsState, QdrantGallery


def open_points(address: str, alias: str, vector: str = "", new_vector: str = "") -> QdrantGallery:
    """The upgrade of a collection's vector: by a second vector called ``new_vector``, or by a second collection.

    An upgrade under way goes on in the form in which it began, without naming the new vector again.

    Raises:
        DataError: an upgrade of the other form, or of another new vector, is under way; see :class:`QdrantGallery`.
    """
    gallery = QdrantGallery(address, alias, vector)
    try:
        state = gallery.status()
        began = state.phase in ("converting", "swapped")
        if began and new_vector not in ("", state.new_vector):
            form = f"to the vector {state.new_vector}" if state.new_vector else "by a second collection"
            raise DataError(f"{gallery.name}: an upgrade {form} is {state.phase}; finish it or roll it back first")
        if state.new_vector and state.source != gallery.collection:
            raise DataError(
                f"{gallery.name}: the upgrade is of the collection {state.source}, and the alias points at "
                f"{gallery.collection}; put it back"
            )
    except BaseException:
        gallery.close()
        raise
    name = state.new_vector or new_vector
    if not name:
        return gallery
    gallery.close()  # a folder is open once only
    return SecondVector(address, alias, vector, name)


class SecondVector(QdrantGallery):
    """The vectors of a collection, upgraded by a second one in the same points.

    Args:
        address, alias, vector: as in :class:`QdrantGallery`; the vector has a name. new: the name of the new vector.
    """

    def __init__(self, address: str, alias: str, vector: str, new: str) -> None:
        super().__init__(address, alias, vector)
        self._new = new

    def _where(self, has: tuple[str, ...] = (), has_not: tuple[str, ...] = ()) -> Any:
        """A filter of points by the vectors that they have."""
        condition = self._models.HasVectorCondition
        return self._models.Filter(
            must=[condition(has_vector=name) for name in has], must_not=[condition(has_vector=name) for name in has_not]
        )

    def _count(self, where: Any) -> int:
        return int(self._client.count(self.collection, count_filter=where).count)

    def _present(self) -> bool:
        params = self._client.get_collection(self.collection).config.params
        return self._new in {**(params.vectors or {}), **(params.sparse_vectors or {})}

    def status(self) -> PointsState:
        """Where the upgrade stands; done: points that have the new vector."""
        with self._clear():
            state = self._state()
            if state.phase == "none" or not self._present():
                return state
            return replace(state, done=self._count(self._where((self._new,))))

    def _check(self, state: PointsState, converter: Converter) -> tuple[str, ...]:
        if not self._vector:
            raise DataError(
                f"{self.name}: the collection's vector has no name, so that none can stand next to it; leave out "
                "`new_vector`: a second collection is made"
            )
        if state.new_vector:
            raise DataError(f"{self.name}: `finish` was interrupted; run it again")
        if self._present():
            raise DataError(f"{self.name}: the collection has a vector {self._new}; give `new_vector` another name")
        if not hasattr(self._client, "create_vector_name"):
            raise DataError(f"{self.name}: a second vector needs qdrant-client 1.18 or later; leave out `new_vector`")
        return super()._check(state, converter)

    def _begin(self, state: PointsState, converter: Converter) -> PointsState:
        before, through, here = state, self._check(state, converter), self.collection
        sizes = (converter.dim_in, converter.dim_out)
        state = PointsState("converting", converter.version, here, here, *sizes, applied=through, new_vector=self._new)
        self._save(state)
        self._save(PointsState(made_from=self._vector), self._new)
        try:
            self._create(state)
        except self._errors as error:
            self._forget(self._new)
            self._save(before) if before.phase == "finished" else self._forget(self._vector)
            raise DataError(
                f"{self.name}: the vector {self._new} could not be added (servers before 1.18 cannot do it; leave out "
                f"`new_vector`): {' '.join(str(error).split())[:200]}"
            ) from None
        return state

    def _create(self, state: PointsState) -> None:
        """The new vector, with the old one's distance, type, index and quantization."""
        models, old = self._models, self._client.get_collection(self.collection).config.params.vectors[self._vector]
        dense = models.DenseVectorConfig(size=state.dim_out, distance=old.distance, datatype=old.datatype)
        self._client.create_vector_name(self.collection, self._new, models.DenseVectorNameConfig(dense=dense))
        given = old.model_dump(include=set(models.VectorParamsDiff.model_fields), exclude_none=True)
        if given:
            diff = models.VectorParamsDiff.model_validate(given)
            self._client.update_collection(self.collection, vectors_config={self._new: diff})

    def upgrade(
        self,
        converter: Converter,
        *,
        batch: int = 1024,
        rows_per_second: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> PointsState:
        """Give every point that has the old vector and not the new one the new one; a rerun fills what is left.

        Raises:
            DataError: an upgrade to another version is under way or done, the vector's name is taken, vectors of
                another dimension, or points come faster than they are converted.
        """
        with self._clear():
            state = self._state()
            self._check_version(state, converter)
            if state.phase not in ("converting", "swapped"):
                state = self._begin(state, converter)
            elif not self._present():
                self._create(state)
            left = self._where((self._vector,), (self._new,))
            total, done, began = self._count(left), 0, time.perf_counter()
            while records := self._client.scroll(
                self.collection, left, limit=batch, with_vectors=[self._vector], with_payload=False
            )[0]:
                made = converter(*self._rows(records, converter))
                points = [
                    self._models.PointVectors(id=record.id, vector={self._new: row.tolist()})
                    for record, row in zip(records, made, strict=True)
                ]
                self._client.update_vectors(self.collection, points)
                done += len(records)
                self._check_pace(done, total, batch)
                if progress is not None:
                    progress(done, max(total, done))
                if rows_per_second is not None:
                    time.sleep(max(0.0, done / rows_per_second - (time.perf_counter() - began)))
            state = replace(state, phase="swapped", done=self._count(self._where((self._new,))))
            self._save(state)
            return state

    def verify(self, converter: Converter, sample: int = 1000, seed: int = 0) -> Check:
        """Re-compute random points' new vectors from their old ones. Raises :class:`DataError`."""
        with self._clear():
            state = self._state()
            if state.phase != "swapped" or state.version != converter.version:
                raise DataError(f"{self.name}: is not upgraded to {converter.version} ({state.phase})")
            both = self._where((self._vector, self._new))
            ids = [record.id for records in self._batches(self.collection, 4096, False, both) for record in records]
            chosen = [ids[at] for at in np.random.default_rng(seed).permutation(len(ids))[:sample]]
            records = self._client.retrieve(self.collection, chosen, with_vectors=True, with_payload=False)
            made = converter(*self._rows(records, converter))
            stored = np.array([record.vector[self._new] for record in records], np.float32)
            return Check(
                len(records),
                smallest_cosine(made, stored),
                rows_before=self._count(self._where((self._vector,))),
                rows_now=self._count(self._where((self._new,))),
                missing=self._count(self._where((self._vector,), (self._new,))),
            )

    def sample(self, count: int, seed: int = 0) -> tuple[IntArray, list[FloatArray]]:
        """Ids and stored vectors of random points: the new ones once all points have them, else the old ones."""
        return self._sample(self._new if self.status().phase == "swapped" else self._vector, count, seed)

    def rollback(self) -> None:
        """Delete the new vector. Raises :class:`DataError`: no upgrade, or points that have the new vector only."""
        with self._clear():
            state = self._state()
            if state.phase not in ("converting", "swapped"):
                raise DataError(f"{self.name}: has no upgrade to roll back")
            if self._present():
                only = self._where((self._new,), (self._vector,))
                if count := self._count(only):
                    first = self._client.scroll(self.collection, only, limit=1)[0][0].id
                    raise DataError(
                        f"{self.name}: {count:,} points have the vector {self._new} only ({first} is one); give them a "
                        "vector of the old model or delete them first"
                    )
                self._client.delete_vector_name(self.collection, self._new)
            self._forget(self._new)
            self._save_rolled_back(state)

    def finish(self) -> None:
        """Delete the old vector: there is no way back. Raises :class:`DataError`: points are left, or no upgrade."""
        with self._clear():
            state = self._state()
            if state.phase not in ("swapped", "finished"):
                raise DataError(f"{self.name}: is not upgraded ({state.phase}); there is nothing to finish")
            if left := self._count(self._where((self._vector,), (self._new,))):
                raise DataError(f"{self.name}: {left:,} points have no vector {self._new} yet; run the upgrade again")
            state = replace(state, phase="finished")
            self._save(state)  # first: a cut one is finished by running it again
            self._save(replace(state, new_vector=""), self._new)
            self._client.delete_vector_name(self.collection, self._vector)
            self._forget(self._vector)
