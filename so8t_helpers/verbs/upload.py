"""The upload of a `push`: large files first, seen by nobody until the one commit that also holds the card."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from so8t_helpers.run.files import StageError
from so8t_helpers.run.origin import FILE as PROVENANCE
from so8t_helpers.verbs.push import WEIGHTS, Plan

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_OLLAMA = ("template", "params", "system")


def send(plan: Plan) -> str:
    """Upload what a plan names, and return the commit's address.

    What the hub has already, by its hash, is not sent again, so that an interrupted upload goes on. Files
    that an earlier push left and this one has not are taken out by the same commit.

    Raises:
        StageError: no token, or one that is not accepted; the repository is public where it should be
            private, or the other way round; it holds a model that no push put there; the hub cannot be
            reached or refuses.
    """
    from huggingface_hub import HfApi, get_token  # noqa: PLC0415
    from huggingface_hub.errors import HTTPError  # noqa: PLC0415  (of every request, answered or not)

    token = get_token()
    if token is None:
        raise StageError("push: no token; `hf auth login` keeps one, or set HF_TOKEN to one that may write")
    for item in plan.items:
        if isinstance(item.content, bytes) and token.encode() in item.content:
            raise StageError(f"push: {item.name} holds your token; take it out, and revoke the token")
    try:
        return _send(HfApi(library_name="so8t"), plan)
    except StageError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # Not `from error`: a traceback that shows locals would show the request and its headers.
        raise StageError(f"push to {plan.repo}: {_said_by(error, token)}") from None


def _send(api: HfApi, plan: Plan) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete  # noqa: PLC0415
    from huggingface_hub.errors import RepositoryNotFoundError  # noqa: PLC0415

    api.whoami()  # a token that is not accepted is known before anything is sent
    names, there = {item.name for item in plan.items}, set()
    try:
        info = api.model_info(plan.repo)
    except RepositoryNotFoundError:
        api.create_repo(plan.repo, private=plan.private)
    else:
        there = {sibling.rfilename for sibling in info.siblings or []}
        _refuse_strangers(plan, bool(info.private), there)
    additions = [CommitOperationAdd(item.name, item.content) for item in plan.items]
    gone = [name for name in sorted(there - names) if _ours(name)]
    deletions = [CommitOperationDelete(name, is_folder=False) for name in gone]
    commit = api.create_commit(plan.repo, [*additions, *deletions], commit_message=f"so8t run {plan.run}")
    return str(commit.commit_url)


def _refuse_strangers(plan: Plan, private: bool, there: set[str]) -> None:
    if private != plan.private:
        is_now, remedy = ("private", "leave out --public") if private else ("public", "say --public")
        raise StageError(
            f"push: {plan.repo} is there already and is {is_now}; {remedy}, change it in the repository's "
            "settings, or name another"
        )
    foreign = sorted(name for name in there if name == "config.json" or _ours(name))
    if foreign and PROVENANCE not in there:
        raise StageError(
            f"push: {plan.repo} holds {foreign[0]}, and no {PROVENANCE}: it is not one that so8t pushed; "
            "name another repository"
        )


def _ours(name: str) -> bool:
    """Whether a file of a repository belongs to one push, and goes where the next has none of that name."""
    index = name == "model.safetensors.index.json"
    return index or name in _OLLAMA or name.endswith(WEIGHTS) or name.startswith(("adapter/", "reports/"))


def _said_by(error: BaseException, token: str) -> str:
    """An error and its cause in words, without what lets others in: the token, a signed address's query."""
    response: Any = getattr(error, "response", None)
    if response is not None and response.status_code == 401:
        return "the hub does not accept the token; `hf auth login` keeps a new one (HF_TOKEN goes before it)"
    causes = [str(e) or type(e).__name__ for e in (error, error.__cause__) if e is not None]
    text = re.sub(r"\?\S+", "", " ".join(" ".join(causes).split())).replace(token, "…")
    return f"{text}; the same command goes on with what is not there yet"
