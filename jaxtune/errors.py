"""The one error that a user should read: a line naming the thing, the place and the remedy."""


class UserError(ValueError):
    """Something that the user can put right. The CLI exits with 2 on it.

    >>> try:
    ...     jaxtune.train(model="demo", optim={"lerning_rate": 1e-3})
    ... except jaxtune.UserError as e:
    ...     print(e)  # doctest: +SKIP
    config: unknown key optim.lerning_rate; did you mean 'learning_rate'?
    """


class Interrupted(Exception):
    """A run was told to stop, has saved, and can be resumed. The CLI exits with 75 on it."""


def nearest(name: str, allowed: list[str]) -> str:
    """`; did you mean 'x'?` for a name close to one of the allowed, or what is allowed.

    >>> nearest("lerning_rate", ["learning_rate", "name"])
    "; did you mean 'learning_rate'?"
    """
    import difflib

    initials = [a for a in allowed if "".join(w[0] for w in a.split("_") if w) == name]  # lr, bs
    close = initials or difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(sorted(allowed))}"
