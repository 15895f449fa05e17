"""Byte-pair merging that goes on from the ranks of a base tokenizer.

One step, by definition: split every pre-token as the tokenizer with the present ranks splits it;
the pair of neighbouring tokens that occurs most often (of equal ones that with the lowest ids)
joins to the bytes of the next rank. So the counts are always those of the tokenizer as it will be
used, no bytes ever get a second id, and no id of the base changes. With the 256 bytes as the base
it is training from scratch.

`Merger` finds the same result in batches. It takes the next best pairs, applies as many as do not
touch each other and make no pair that would have come before the last of them, and has numpy do
their work at once: thousands of merges take hundreds of batches. What a batch cannot hold, bytes
that joined with a neighbour are a rank already or a whole pre-token, is a step of its own.

P: positions (one a token of a pre-token, linked to its neighbours), K: the batch's occurrences.
"""

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tiktoken
from jaxtyping import Int

from llama3_jax.data.bpe_pairs import Pairs
from llama3_jax.errors import UserError

POOL = 4096  # pairs among which the best are looked for, until one outside may be better
BATCH = 8  # merges tried at once in the beginning; adapts
_SEPARATOR = "<|next_pretoken|>"


def extend(
    ranks: Mapping[bytes, int],
    counts: Mapping[str, int],
    new_tokens: int,
    on_progress: Callable[[int], None] = lambda merged: None,
) -> dict[bytes, int]:
    """`ranks` and `new_tokens` more, by merging on pre-tokens that occur `counts` (above 0) times.

    Raises:
      UserError: fewer merges are possible.
    """
    merger = Merger(ranks, list(counts), list(counts.values()))
    while (missing := len(ranks) + new_tokens - len(merger.ranks)) > 0:
        if not merger.step(missing):
            raise UserError(
                f"only {new_tokens - missing:,} of {new_tokens:,} new tokens can be merged from "
                "this text: ask for fewer or give more text"
            )
        on_progress(len(merger.ranks) - len(ranks))
    return merger.ranks


def split(
    ranks: Mapping[bytes, int], pretokens: Sequence[str]
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " pretokens"]]:
    """Ids of all pre-tokens, each taken as it stands, and how many ids each has."""
    separator = len(ranks)
    encoding = tiktoken.Encoding(
        "pretokens",
        pat_str=r"(?s:.+)",
        mergeable_ranks=dict(ranks),
        special_tokens={_SEPARATOR: separator},
    )
    # One call with separators: a call a pre-token costs more than its merges.
    text = "".join(pretoken + _SEPARATOR for pretoken in pretokens)
    tokens = encoding.encode_to_numpy(text, allowed_special={_SEPARATOR}).astype(np.int32)
    ends = np.flatnonzero(tokens == separator)
    if len(ends) != len(pretokens):
        raise ValueError(f"a pre-token holds {_SEPARATOR}")
    return np.delete(tokens, ends), np.diff(ends, prepend=-1) - 1


def merge(parts: Sequence[bytes], ranks: Mapping[bytes, int]) -> list[bytes]:
    """Joins neighbours that make a token, lowest rank first and of these the left one, to the end."""
    parts = list(parts)
    while True:
        joined = [left + right for left, right in itertools.pairwise(parts)]
        known = [(ranks[token], i) for i, token in enumerate(joined) if token in ranks]
        if not known:
            return parts
        _, at = min(known)
        parts[at : at + 2] = [joined[at]]


class Merger:
    """The pre-tokens as linked tokens, and how often each pair of neighbours occurs."""

    def __init__(self, ranks: Mapping[bytes, int], pretokens: Sequence[str], counts: Sequence[int]):
        self.ranks = dict(ranks)
        self._bytes = sorted(self.ranks, key=self.ranks.__getitem__)  # by id
        token_P, lengths = split(ranks, pretokens)
        # Words: pre-tokens that are more than one token.
        words = np.flatnonzero(lengths > 1)
        self._token_P = token_P[np.repeat(lengths > 1, lengths)]
        lengths = lengths[words]
        total = len(self._token_P)
        if total >= 2**31:
            raise UserError(
                f"{total:,} tokens in different pre-tokens are too many: leave out more"
            )
        stops = np.cumsum(lengths)
        self._first = (stops - lengths).astype(np.int32)
        self._word_of = {pretokens[i].encode(): word for word, i in enumerate(words.tolist())}
        self._word_P = np.repeat(np.arange(len(words), dtype=np.int32), lengths)
        self._weight_P = np.repeat(np.asarray(counts, np.int64)[words], lengths)
        self._next_P = np.arange(1, total + 1, dtype=np.int32)
        self._next_P[stops - 1] = -1
        self._previous_P = np.arange(-1, total - 1, dtype=np.int32)
        self._previous_P[self._first] = -1
        self._stage_P = np.full(total, -1, np.int32)  # scratch: all -1 between steps
        self._pair_P = np.full(total, -1, np.int32)  # the pair that begins here

        self._pairs = Pairs()
        starts = np.flatnonzero(self._next_P >= 0).astype(np.int32)
        self._add_pairs(starts)
        self._pool, self._floor = np.zeros(0, np.int64), 0
        self._batch = BATCH

    def step(self, limit: int) -> int:
        """Adds at most `limit` tokens; returns how many, 0 when nothing is left to merge."""
        candidates = self._best(min(limit, self._batch))
        if not candidates:
            return 0
        stages = self._stages(candidates)
        occurrences = self._occurrences(stages)
        done = self._independent(stages, occurrences)
        if done == 0:
            self._merge_alone(stages[0], occurrences.position_K[occurrences.stage_K == 0])
            return 1
        self._batch = 2 * done if done == len(stages) else max(BATCH, done + done // 2)
        self._commit(stages[:done], occurrences.of_stages_below(done))
        return done

    # ------------------------------------------------------------------------- what comes next

    def _best(self, number: int) -> list[int]:
        """The `number` most frequent pairs (or fewer, but the first of them), in order."""
        pairs = self._pairs
        self._pool = self._pool[pairs.count[self._pool] >= max(self._floor, 1)]
        if not len(self._pool):
            counts = pairs.count.filled
            size = min(POOL, len(counts))
            self._floor = max(1, int(np.partition(counts, -size)[-size])) if size else 1
            self._pool = np.flatnonzero(counts >= self._floor)
        pool, counts = self._pool, pairs.count[self._pool]
        if len(pool) > number:
            chosen = counts >= np.partition(counts, -number)[-number]
            pool, counts = pool[chosen], counts[chosen]
        order = np.lexsort((pairs.right[pool], pairs.left[pool], -counts))
        return pool[order][:number].tolist()

    def _stages(self, candidates: list[int]) -> list["_Stage"]:
        """A stage for each new token: its bytes and every pair that joins to them."""
        pairs, stages, seen = self._pairs, [], set()
        for pair in candidates:
            if pair in seen:
                continue
            left, right = int(pairs.left[pair]), int(pairs.right[pair])
            joined = self._bytes[left] + self._bytes[right]
            same = [pair]
            for cut in range(1, len(joined)):
                head = self.ranks.get(joined[:cut])
                if head is None or head == left:
                    continue
                tail = self.ranks.get(joined[cut:])
                if tail is None:
                    continue
                other = pairs.find(head, tail)
                if other is not None and pairs.count[other]:
                    same.append(other)
            seen.update(same)
            stages.append(_Stage(joined, same, (-int(pairs.count[pair]), left, right)))
        return stages

    def _occurrences(self, stages: list["_Stage"]) -> "_Occurrences":
        """Where the stages' pairs begin, by position, overlapping ones too."""
        lists, numbers, ids = [], [], []
        for number, stage in enumerate(stages):
            for pair in stage.pairs:
                lists.append(self._pairs.positions_of(pair))
                numbers.append(number)
                ids.append(pair)
        lengths = [len(positions) for positions in lists]
        position_K = np.concatenate(lists)
        stage_K = np.repeat(np.array(numbers, np.int32), lengths)
        alive = self._pair_P[position_K] == np.repeat(np.array(ids, np.int32), lengths)
        position_K, stage_K = position_K[alive], stage_K[alive]
        order = np.argsort(position_K, kind="stable")
        return _Occurrences(position_K[order], stage_K[order])

    def _independent(self, stages: list["_Stage"], occurrences: "_Occurrences") -> int:
        """How many of the first stages may be applied together; 0: the first is a special case.

        Also drops from `occurrences` those that overlap an earlier one of their own stage.
        """
        limit = len(stages)
        for number, stage in enumerate(stages):
            # The tokenizer looks a whole pre-token up before it merges.
            word = self._word_of.get(stage.bytes)
            if word is not None and self._next_P[self._next_P[self._first[word]]] >= 0:
                limit = number
                break

        position_K, stage_K = occurrences
        touches = self._next_P[position_K[:-1]] == position_K[1:]
        own = stage_K[:-1] == stage_K[1:]
        clash = touches & ~own
        if clash.any():
            limit = min(limit, int(np.maximum(stage_K[:-1], stage_K[1:])[clash].min()))
        chained = touches & own
        if chained.any():  # of three equal tokens in a row the first two join
            index = np.arange(len(position_K))
            begin = np.maximum.accumulate(np.where(np.append(False, chained), 0, index))
            occurrences.keep((index - begin) % 2 == 0)
        if limit == 0:
            return 0
        occurrences.keep(occurrences.stage_K < limit)
        return self._in_order(stages[:limit], occurrences)

    def _in_order(self, stages: list["_Stage"], occurrences: "_Occurrences") -> int:
        """How many of the first stages make no pair that would have come before the next stage.

        Looks at the pairs as each stage makes them, though a later one may merge them at once.
        """
        position_K, stage_K = occurrences
        middle_K = self._next_P[position_K]
        self._stage_P[position_K] = self._stage_P[middle_K] = stage_K
        before_K, after_K = self._previous_P[position_K], self._next_P[middle_K]
        new = len(self.ranks)
        token_K = (stage_K + new).astype(np.int64)

        def neighbour(at: np.ndarray, stage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            merged = self._stage_P[at]
            known = (merged >= 0) & (merged <= stage)
            return np.where(known, merged + new, self._token_P[at]).astype(np.int64), merged

        with_left = before_K >= 0
        left, merged = neighbour(before_K[with_left], stage_K[with_left])
        once = merged != stage_K[with_left]  # two of one stage side by side: counted on the left
        with_right = after_K >= 0
        right, merged = neighbour(after_K[with_right], stage_K[with_right])
        # Of two of one stage side by side the left one merges first, and meets for a moment
        # what the right one begins with: no pair to count, but it may be a rank.
        moment = merged == stage_K[with_right]
        met = self._token_P[after_K[with_right]][moment]
        self._stage_P[position_K] = self._stage_P[middle_K] = -1

        keys = np.concatenate([
            (left << 32 | token_K[with_left])[once],
            token_K[with_right] << 32 | right,
            token_K[with_right][moment] << 32 | met,
        ])  # fmt: skip
        weights = np.concatenate([
            self._weight_P[position_K[with_left]][once],
            self._weight_P[position_K[with_right]],
            np.zeros(len(met), np.int64),
        ])  # fmt: skip
        keys, counts = _sum_by_key(keys, weights)
        lefts, rights = keys >> 32, keys & 0xFFFFFFFF
        made_at = np.maximum(lefts, rights) - new

        limit = len(stages)
        order = [stage.order for stage in stages]
        least = -order[-1][0]
        for i in np.flatnonzero(counts >= least).tolist():
            earlier = bisect.bisect_left(order, (-int(counts[i]), int(lefts[i]), int(rights[i])))
            limit = min(limit, max(earlier, int(made_at[i]) + 1))
        self._bytes += [stage.bytes for stage in stages]
        stage_of = {stage.bytes: number for number, stage in enumerate(stages)}
        for at, a, b in zip(made_at.tolist(), lefts.tolist(), rights.tolist(), strict=True):
            joined = self._bytes[a] + self._bytes[b]
            if joined in self.ranks:
                limit = min(limit, at)
            elif joined in stage_of:
                later = stage_of[joined]
                limit = min(limit, later if later > at else at)
        del self._bytes[new:]
        return limit

    # ----------------------------------------------------------------------------- what is done

    def _commit(self, stages: list["_Stage"], occurrences: "_Occurrences") -> None:
        """Joins all occurrences; they do not overlap."""
        position_K, stage_K = occurrences
        middle_K = self._next_P[position_K]
        before_K, after_K = self._previous_P[position_K], self._next_P[middle_K]
        lost = np.concatenate([before_K[before_K >= 0], position_K, middle_K[after_K >= 0]])
        # A pair between two occurrences is both the left one's and the right one's.
        lost = np.unique(lost)
        np.subtract.at(self._pairs.count.filled, self._pair_P[lost], self._weight_P[lost])

        self._token_P[position_K] = stage_K + len(self.ranks)
        self._next_P[position_K] = after_K
        self._previous_P[after_K[after_K >= 0]] = position_K[after_K >= 0]
        self._pair_P[middle_K] = self._pair_P[position_K] = -1
        for stage in stages:
            self._name(stage.bytes)

        before_K = self._previous_P[position_K]
        changed = np.concatenate([before_K[before_K >= 0], position_K[after_K >= 0]])
        made = self._add_pairs(np.unique(changed))
        self._pool = np.append(self._pool, made[self._pairs.count[made] >= self._floor])

    def _add_pairs(self, position_P: np.ndarray) -> np.ndarray:
        """Registers the pairs that begin at these positions, none known before; returns them."""
        left, right = self._token_P[position_P], self._token_P[self._next_P[position_P]]
        keys = left.astype(np.int64) << 32 | right
        order = np.argsort(keys, kind="stable")
        keys, position_P = keys[order], position_P[order]
        begin = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else order
        sums = np.add.reduceat(self._weight_P[position_P], begin) if len(keys) else order
        ids = self._pairs.add(keys[begin], sums, position_P, begin)
        self._pair_P[position_P] = np.repeat(ids, np.diff(np.append(begin, len(keys))))
        return ids

    def _merge_alone(self, stage: "_Stage", position_K: np.ndarray) -> None:
        """The same for one stage, pre-token by pre-token, whatever it leads to."""
        words = set(self._word_P[position_K].tolist())
        if stage.bytes in self._word_of:
            words.add(self._word_of[stage.bytes])
        self._name(stage.bytes)
        touched = set()
        for word in sorted(words):
            touched |= self._resplit(word)
        touched = np.array(sorted(touched), np.int64)
        frequent = touched[self._pairs.count[touched] >= self._floor]
        self._pool = np.unique(np.append(self._pool, frequent))

    def _resplit(self, word: int) -> set[int]:
        """Splits one pre-token as the ranks now do; returns the pairs that it gained."""
        positions = [int(self._first[word])]
        while (following := int(self._next_P[positions[-1]])) >= 0:
            positions.append(following)
        parts = [self._bytes[self._token_P[at]] for at in positions]
        whole = self.ranks.get(b"".join(parts))
        parts = merge(parts, self.ranks) if whole is None else [self._bytes[whole]]
        tokens = [self.ranks[part] for part in parts]
        weight, gained = self._weight_P[positions[0]], set()
        for at in positions[:-1]:
            self._pairs.count[self._pair_P[at]] -= weight
        for i, at in enumerate(positions):
            if i < len(tokens):
                self._token_P[at] = tokens[i]
            if i < len(tokens) - 1:
                pair = self._pairs.find(tokens[i], tokens[i + 1])
                if pair is None:
                    pair = self._pairs.add_empty(tokens[i], tokens[i + 1])
                if pair != self._pair_P[at]:
                    self._pairs.add_position(pair, at)
                    self._pair_P[at] = pair
                self._pairs.count[pair] += weight
                gained.add(pair)
            else:
                self._pair_P[at] = self._next_P[at] = -1
        return gained

    def _name(self, token: bytes) -> None:
        self.ranks[token] = len(self._bytes)
        self._bytes.append(token)


class _Stage:
    """A new token: its bytes, the pairs that join to it, and its place in the order of merges."""

    def __init__(self, token: bytes, pairs: list[int], order: tuple[int, int, int]):
        self.bytes, self.pairs, self.order = token, pairs, order


class _Occurrences:
    """Where pairs begin, sorted by position, and the stage that merges each."""

    def __init__(self, position_K: np.ndarray, stage_K: np.ndarray):
        self.position_K, self.stage_K = position_K, stage_K

    def __iter__(self):
        return iter((self.position_K, self.stage_K))

    def keep(self, mask: np.ndarray) -> None:
        self.position_K, self.stage_K = self.position_K[mask], self.stage_K[mask]

    def of_stages_below(self, limit: int) -> "_Occurrences":
        mask = self.stage_K < limit
        return _Occurrences(self.position_K[mask], self.stage_K[mask])


def _sum_by_key(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not len(keys):
        return keys, values
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    begin = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    return keys[begin], np.add.reduceat(values[order], begin)
