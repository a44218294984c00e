/* SPDX-License-Identifier: Apache-2.0 */
/* Prints how an invocation ends: a result or an error object on stdout, and a line for people on stderr. */
#define _GNU_SOURCE
#include "shim.h"

#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void note(const char *format, ...)
{
    va_list values;
    char *line;

    va_start(values, format);
    if (vasprintf(&line, format, values) < 0)
        return;
    for (char *c = line; *c; c++)
        if (iscntrl((unsigned char)*c)) /* a quoted value must not start a line of its own */
            *c = ' ';
    fprintf(stderr, "sidestep-cni: %s\n", line);
}

/* stdio finishes short writes. No signal has a handler, so nothing interrupts a write. */
bool print_json(const json_t *output)
{
    char *text = json_dumps(output, JSON_COMPACT);

    if (text && fputs(text, stdout) >= 0 && fputc('\n', stdout) >= 0 && fflush(stdout) == 0)
        return true;
    note("cannot write to stdout: %s", text ? strerror(errno) : "out of memory");
    return false;
}

bool always_succeeds(const struct invocation *inv)
{
    return !strcmp(inv->command, "DEL") || !strcmp(inv->command, "GC");
}

static const char *sentence(const char *format, va_list values)
{
    char *message;

    return vasprintf(&message, format, values) < 0 ? "out of memory" : message;
}

static json_t *error_object(const struct invocation *inv, enum code code, const char *message)
{
    return json_pack("{s:s, s:i, s:s}", "cniVersion", inv->cni_version, "code", (int)code, "msg", message);
}

static _Noreturn void fail_with(const struct invocation *inv, enum code code, const char *message)
{
    json_t *error = error_object(inv, code, message);

    note("%s", message);
    if (!error) /* the message quotes bytes that JSON cannot carry */
        error = error_object(inv, code, "the invocation has bytes that are not UTF-8; see the plugin's stderr");
    print_json(error);
    exit(1);
}

_Noreturn void fail(const struct invocation *inv, enum code code, const char *format, ...)
{
    va_list values;

    va_start(values, format);
    fail_with(inv, code, sentence(format, values));
}

_Noreturn void fail_unless_leaving(const struct invocation *inv, enum code code, const char *format, ...)
{
    const char *message;
    va_list values;

    va_start(values, format);
    message = sentence(format, values);
    if (!always_succeeds(inv))
        fail_with(inv, code, message);
    note("warning: %s succeeds although %s", inv->command, message);
    exit(0);
}
