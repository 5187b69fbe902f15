"""The fields of a ModelService's `spec`: types, limits, defaults, rules and what each means. Pure; see `crd`.

A person reads this through `kubectl explain`, so a description says what happens, not what the field is called.
"""

from __future__ import annotations

from layercast_operator.modelservice import DTYPES, ENGINES, ScalePolicy, ScalingMode
from layercast_operator.schema import Schema, band, boolean, int32, mapping, number, rule, text


def _model() -> Schema:
    return mapping(
        "Which parameters are served.",
        {
            "source": text(
                "Where the checkpoint is: hf://organisation/name, s3://bucket/path, gs://bucket/path, "
                "file:///absolute/path on the nodes, or pvc://claim/path. Safetensors only; pickled files are "
                "refused.",
                minLength=8,
                maxLength=1024,
                pattern="^(hf|file|pvc|s3|gs)://.+",
            ),
            "revision": text(
                "Branch, tag or commit of an hf source. A change is rolled out: new replicas load it before old "
                "ones drain. Empty means the default branch.",
                maxLength=256,
            ),
            "dtype": text(
                "Type of the parameters in memory; empty means the checkpoint's own.", enum=list(DTYPES)
            ),
        },
        required=("source",),
    )


def _scaling() -> Schema:
    promql = "PromQL; $model stands for the ModelService's name. Empty means the shipped expression."
    limits: Schema = {"maxLength": 4096}
    return mapping(
        "How the number of replicas follows demand. Without it, replicas says it alone.",
        {
            "min": int32(
                "Fewest replicas; 0 lets the model go while nobody asks for it.", default=1, minimum=0
            ),
            "max": int32("Most replicas.", minimum=1),
            "mode": text(
                "Auto acts on decisions. Recommend only reports them, and replicas stays with whoever writes it: a "
                "person, a HorizontalPodAutoscaler or KEDA through the scale subresource.",
                default=ScalingMode.AUTO.value,
                enum=[mode.value for mode in ScalingMode],
            ),
            "policy": text(
                "How a new replica comes into service: live executes the layers that it has while the others arrive, "
                "stop-the-world waits for all of them. The others wait too, and are there to compare: with network "
                "nobody passes on what arrives; host-cache and ttl-cache load from the host memory of their own "
                "node, of which with host-cache every node keeps a copy, with ttl-cache those that served the "
                "model lately, and the others load from disk.",
                default=ScalePolicy.LIVE.value,
                enum=[policy.value for policy in ScalePolicy],
            ),
            "metrics": mapping(
                "What Prometheus is asked for; used where the operator knows one. The gateways' own metrics are read "
                "in any case and are faster.",
                {
                    "promptTokensWaiting": text(f"Prompt tokens without a first token. {promql}", **limits),
                    "requestsWaiting": text(f"Requests without a first token. {promql}", **limits),
                    "requestsInFlight": text(f"Requests that have not ended. {promql}", **limits),
                },
            ),
            "targets": _targets(),
            "windows": mapping(
                "How long something must last before it counts.",
                {
                    "scaleDownSeconds": number(
                        "Demand must be low for so long, and for at least as long as loading took, before one "
                        "replica goes.",
                        default=10,
                        minimum=0,
                        maximum=86400,
                    ),
                    "hostCacheSeconds": number(
                        "With ttl-cache: how long a node keeps a model in host memory that it serves no more.",
                        default=300,
                        minimum=0,
                        maximum=86400,
                    ),
                },
            ),
        },
        required=("max",),
        rules=[rule("self.min <= self.max", "min must not be above max", ".min")],
    )


def _targets() -> Schema:
    return mapping(
        "How much work for each replica is right.",
        {
            "queueSeconds": band(
                "Seconds of prefill work that may wait for each replica.",
                low=0.5,
                high=0.7,
                most=3600,
            ),
            "kvUtilization": band("Share of a replica's KV pages in use.", low=0.75, high=0.95, most=1),
            "prefillTokensPerSecond": number(
                "Prompt tokens that one replica computes in a second; 0 takes what was measured.",
                default=0,
                minimum=0,
            ),
        },
    )


def _parallelism() -> Schema:
    return mapping(
        "How one replica is spread.",
        {
            "tensorParallel": int32(
                "Devices of one replica. It cannot be changed; more than 1 is refused by this version.",
                default=1,
                minimum=1,
                maximum=64,
            )
        },
        filled=True,
        rules=[
            rule(
                "self.tensorParallel == oldSelf.tensorParallel",
                "tensorParallel cannot be changed: make another ModelService",
                ".tensorParallel",
            )
        ],
    )


def _disaggregation() -> Schema:
    def bounds(text_: str) -> Schema:
        return mapping(
            text_,
            {
                "min": int32("Fewest, where there are replicas enough.", default=1, minimum=1),
                "max": int32("Most; 0 leaves it to the number of all replicas.", default=0, minimum=0),
            },
            rules=[rule("self.max == 0 || self.min <= self.max", "min must not be above max", ".min")],
        )

    return mapping(
        "With it, even empty, some replicas compute prompts (prefill) and hand each request with its KV to others, "
        "which give its answer (decode). How the replicas are divided follows demand: waiting prompts call for "
        "prefill, KV pages for decode. A single replica does both.",
        {
            "prefill": bounds("Replicas that compute prompts."),
            "decode": bounds("Replicas that give answers."),
        },
    )


def _placement() -> Schema:
    return mapping(
        "Where replicas may be.",
        {
            "nodeSelector": {
                "type": "object",
                "description": "Labels that a node must have to take replicas of this model.",
                "additionalProperties": {"type": "string", "maxLength": 63},
                "maxProperties": 32,
            }
        },
    )


def spec() -> Schema:
    return mapping(
        "What is wanted.",
        {
            "model": _model(),
            "replicas": int32(
                "Replicas to serve with. With scaling in mode Auto it is where to start, and a change moves the "
                "number at once; then demand decides again. The operator never writes it.",
                default=1,
                minimum=0,
            ),
            "scaling": _scaling(),
            "parallelism": _parallelism(),
            "disaggregation": _disaggregation(),
            "placement": _placement(),
            "serving": mapping(
                "How requests are served.",
                {
                    "contextLength": int32(
                        "Longest sequence in tokens; 0 means the checkpoint's own.", default=0, minimum=0
                    ),
                    "batchSize": int32("Most requests that a replica runs at once.", default=16, minimum=1),
                    "stepTokens": int32(
                        "Most tokens that a replica computes in one step, over all its requests; longer prompts are "
                        "cut. Fewer: answers in progress wait less for new prompts. More: fewer steps for the same "
                        "work. 0 means 2048 on a GPU and 128 on a CPU. Replicas that are there keep theirs.",
                        default=0,
                        minimum=0,
                    ),
                    "engine": text(
                        "Which block executes the layers: generic runs every supported architecture, fast the Llama "
                        "family. auto takes fast where it can run the model. Replicas that are there keep theirs.",
                        default="auto",
                        enum=list(ENGINES),
                    ),
                    "prefixCaching": boolean(
                        "Whether a prompt that begins like an earlier one takes over what is in the KV pages. "
                        "Replicas that are there keep theirs.",
                        default=True,
                    ),
                },
            ),
            "drain": mapping(
                "How a replica ends.",
                {
                    "graceSeconds": number(
                        "How long its requests may run on; then they continue elsewhere.",
                        default=20,
                        minimum=0,
                        maximum=3600,
                    )
                },
            ),
        },
        required=("model",),
    )
