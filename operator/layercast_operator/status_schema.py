"""The fields of a ModelService's `status`, as the operator writes them. Pure; see `crd`."""

from __future__ import annotations

from layercast_operator.schema import Schema, int32, int64, mapping, moment, number, sequence, text


def _condition() -> Schema:
    return mapping(
        "One statement about the ModelService.",
        {
            "type": text("What is stated."),
            "status": text("True, False or Unknown.", enum=["True", "False", "Unknown"]),
            "reason": text("Why, in one word for machines."),
            "message": text("Why, in words for people."),
            "observedGeneration": int64("The generation of the specification that it was judged by."),
            "lastTransitionTime": moment("Since when it has this status."),
        },
        required=("type", "status", "reason", "message", "lastTransitionTime"),
    )


def _replica() -> Schema:
    return mapping(
        "One replica as it was last seen.",
        {
            "replicaId": text("Its name."),
            "node": text("Where it is."),
            "device": text("The device that it has."),
            "role": text(
                "What it does for requests: Prefill computes prompts, Decode gives answers, Both does both."
            ),
            "state": text("Loading, Live, Serving, Draining, Drained or Failed."),
            "layersResident": int32("Layers whose parameters are there."),
            "layersTotal": int32("Layers of the model."),
            "source": text("Who its parameters come from, or came from."),
            "bytesPerSecond": int64("Rate at which parameters arrive."),
            "doneBytes": int64("Parameters that have arrived."),
            "totalBytes": int64("Parameters in all."),
            "requestsWaiting": int32("Requests that it holds and does not run."),
            "requestsRunning": int32("Requests that it runs."),
            "prefillTokensPerSecond": number("Prompt tokens that it computes in a second, measured."),
            "handoffsGiven": int64("Requests that it gave to other replicas."),
            "handoffsTaken": int64("Requests that it took from other replicas."),
            "requestsMoved": int64("Requests that it gave away while they ran, with their KV."),
            "engine": text("Which block executes its layers, and with what."),
            "error": text("Why it failed."),
        },
        required=("replicaId",),
    )


def _host_copy() -> Schema:
    return mapping(
        "One copy of the checkpoint in the host memory of a node.",
        {
            "node": text("Where it is."),
            "state": text("Filling, Complete, Dropping or Failed."),
            "source": text("Who it comes from at the moment; empty while it rests."),
            "bytesPerSecond": int64("Rate at which it arrives, or arrived."),
            "doneBytes": int64("Parameters that have arrived."),
            "totalBytes": int64("Parameters in all."),
            "followers": int32("Peers that read it, or would if another source died."),
            "error": text("Why it failed."),
        },
        required=("node",),
    )


def _prediction() -> Schema:
    return mapping(
        "One estimate of how long something takes, and what it took.",
        {
            "what": text(
                "What is predicted. first-segment and load: until the first segment and all parameters are there, since"
                " the replica was asked for. transfer: all of them, since it was said whom they are read from."
            ),
            "way": text("The kind of copy that is read: device, host memory, disk or origin."),
            "since": moment("From when it counts."),
            "priorSeconds": number("What the rates alone say."),
            "predictedSeconds": number("The same, corrected by what such things took before."),
            "actualSeconds": number("What it took; missing while it lasts."),
        },
        required=("what", "predictedSeconds"),
    )


def _scale() -> Schema:
    replica = mapping(
        "One replica that the decision brought: its timeline.",
        {
            "replicaId": text("Its name."),
            "node": text("Where it was placed."),
            "source": text("Who its parameters came from."),
            "assignedAt": moment("When its device was assigned."),
            "firstSegmentAt": moment("When its first segment was complete."),
            "firstLayerAt": moment("When it first executed a layer."),
            "firstTokenAt": moment("When it gave its first token."),
            "completeAt": moment("When all of its parameters were there."),
            "bytesPerSecond": int64("Rate at which they arrived."),
            "predictions": sequence(
                "How long it was expected to take, and what it took.", _prediction(), "what"
            ),
        },
        required=("replicaId",),
    )
    return mapping(
        "One decision that changed the number of replicas, and what came of it.",
        {
            "decidedAt": moment("When it was decided."),
            "from": int32("Replicas before."),
            "to": int32("Replicas after."),
            "rule": text("Which rule decided."),
            "reason": text("Why, with the numbers."),
            "policy": text("How the new replicas come into service."),
            "replicas": sequence("Those that were started for it.", replica),
        },
        required=("decidedAt", "from", "to"),
    )


def _decision() -> Schema:
    return mapping(
        "What the policy says now, whether or not anything changes.",
        {
            "replicas": int32("The outcome."),
            "rule": text("Which rule decided."),
            "reason": text("Why, in words."),
            "numbers": {
                "type": "object",
                "description": "What it was computed from; what is missing is not known.",
                "additionalProperties": {"type": "number"},
            },
            "alternatives": sequence("What other numbers of replicas would mean.", text("One alternative.")),
        },
    )


def status() -> Schema:
    return mapping(
        "What was last seen. Written by the operator only.",
        {
            "observedGeneration": int64("The generation of the specification that is in force."),
            "observedReplicas": int32(
                "The spec.replicas that was acted on last: another one is a person's wish, also after a restart."
            ),
            "ready": text("Replicas that serve and replicas wanted, for the eye."),
            "counts": mapping(
                "Replicas by what they do.",
                {
                    "desired": int32("Wanted."),
                    "serving": int32("With all parameters, taking requests."),
                    "loading": int32("With parameters on their way; live ones execute already."),
                    "draining": int32("Leaving."),
                    "active": int32("Serving or on their way: what there is, for the scale subresource."),
                },
            ),
            "selector": text("Label selector for the scale subresource."),
            "conditions": sequence("Statements about the service; Ready sums them up.", _condition(), "type"),
            "replicas": sequence("Each replica.", _replica(), "replicaId"),
            "hostCopies": sequence("Each copy in host memory.", _host_copy(), "node"),
            "lastScale": _scale(),
            "scales": sequence("The last decisions, oldest first.", _scale()),
            "decision": _decision(),
            "recommendation": mapping(
                "In mode Recommend: what would be done.",
                {
                    "replicas": int32("The number."),
                    "rule": text("Which rule decided."),
                    "reason": text("Why, in words."),
                },
            ),
            "latency": mapping(
                "As the gateways saw it in the last minutes, told by Prometheus.",
                {"ttftP99": text("99th percentile of the time to the first token, for the eye.")},
            ),
            "endpoint": text("Where clients find it."),
        },
    )
