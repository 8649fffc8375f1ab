"""The HTTP application: routes, keys, errors. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI

import veneer
from veneer.server import (
    adapters_api,
    aliases_api,
    chat,
    completions,
    embeddings,
    files_api,
    health,
    jobs_api,
    merge_api,
    models,
    responses,
    sglang_api,
    tokenize_api,
    vllm_api,
)
from veneer.server.auth import AuthMiddleware
from veneer.server.errors import install_error_handlers
from veneer.server.jobs import JobSupervisor
from veneer.server.openapi import install_document
from veneer.server.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """The application around `state`. The caller starts and stops `state.engine`, after this call."""
    supervisor = JobSupervisor(state, lambda template, tokens: _own_models(app, state, template, tokens))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        training = asyncio.create_task(supervisor.run(), name="supervisor of jobs")
        yield
        training.cancel()
        with suppress(asyncio.CancelledError):
            await training
        await asyncio.to_thread(state.texts.close)

    app = FastAPI(title="Veneer", version=veneer.__version__, lifespan=lifespan)
    app.state.veneer = state
    app.state.jobs = supervisor
    app.add_middleware(AuthMiddleware, api_keys=state.config.api_keys, admin_key=state.config.admin_key)
    install_error_handlers(app)
    for module in (
        health,
        models,
        chat,
        completions,
        embeddings,
        responses,
        tokenize_api,
        merge_api,
        adapters_api,
        aliases_api,
        vllm_api,
        sglang_api,
        files_api,
        jobs_api,
    ):
        app.include_router(module.router)
    install_document(app)
    return app


def _own_models(app: FastAPI, state: ServerState, template: Any, max_new_tokens: int) -> Any:
    """This server's models, asked without a socket."""
    import httpx

    from veneer.server.eval_client import ServerModels

    keys = (state.config.admin_key, *state.config.api_keys)
    return ServerModels(
        "http://veneer",
        api_key=next((key for key in keys if key), None),
        template=template,
        max_new_tokens=max_new_tokens,
        transport=httpx.ASGITransport(app),
    )
