"""A plugin of pytest: clients of httpx wait for an answer as long as scenarios do.

They give up after five seconds if nobody says otherwise, which says more of the host that tests run on than of
what answers.
"""

import functools

import httpx

PATIENCE_SEC = 300


def patient(init):
    @functools.wraps(init)
    def with_patience(self, *args, **kwargs):
        kwargs.setdefault("timeout", PATIENCE_SEC)
        init(self, *args, **kwargs)

    return with_patience


for client in (httpx.Client, httpx.AsyncClient):
    client.__init__ = patient(client.__init__)
