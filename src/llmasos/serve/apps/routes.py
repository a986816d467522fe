"""Installed applications over HTTP. The types are in `llmasos.client.types.apps`.

    GET    /llmasos/v1/apps                      {"object": "list", "data": [AppInfo]}          every key: those it may use
    POST   /llmasos/v1/apps                      InstallAppRequest -> 201 AppInfo, 409 with the sheet       scope manage
    PUT    /llmasos/v1/apps?accept=&trust=       body: a .llmapp -> as POST                                 scope manage
    GET    /llmasos/v1/apps/openapi.json         the applications' OpenAPI documents as one                 every key
    GET    /llmasos/v1/apps/{name}               AppInfo                                                    every key
    PATCH  /llmasos/v1/apps/{name}               ConfigureAppRequest -> AppInfo                             scope manage
    DELETE /llmasos/v1/apps/{name}?data=false    RemovedApp                                                 scope manage
    GET    /llmasos/v1/apps/{name}/logs          text; with `follow` events of AppLogLine; `limit`          scope manage
    POST   /llmasos/v1/apps/{name}/{action}      start stop restart update rollback; AppAction -> AppInfo   scope manage
    *      /apps/{name}/...                      the application's own routes, /app.json, /mcp, /jobs ...   scope inference

A 409 of install and update is an error body with the sheet beside it:
    {"error": {"message": ..., "code": "not_accepted", ...}, "sheet": AppSheet}
and the request is sent again with `"accept": sheet.accept`. An install answers 422 with code `unhealthy` where the
application does not start; what was there before is there again then.

`GET /v1/models` lists an application that can chat as `app/NAME`; `POST /v1/chat/completions` with that model goes to
it, with the caller's right to the application (`apps` of its key) and to the model's name.
`/apps/NAME/app.json` and `/apps/NAME/openapi.json` are answered without starting it.
"""
