"""The messages of the Open Inference Protocol's gRPC service, built when they are first needed.

They live in a descriptor pool of their own: an inference client in the same process registers messages of the same
names in the global one. On the wire only numbers and types of fields count, so nested messages are written here side by
side, and a map as the repeated pairs of key and value that it is.
"""

from __future__ import annotations

import copyreg
from functools import cache
from typing import Any

# protobuf ships no types
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped, unused-ignore]

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

METHODS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelConfig",
    "RepositoryIndex",
)
"""Each takes `<Method>Request` and answers with `<Method>Response`."""

FIELDS = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "1:live:bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "1:ready:bool",
    "ModelReadyRequest": "1:name:string 2:version:string",
    "ModelReadyResponse": "1:ready:bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "1:name:string 2:version:string 3:extensions:string*",
    "ModelMetadataRequest": "1:name:string 2:version:string",
    "ModelMetadataResponse": "1:name:string 2:versions:string* 3:platform:string 4:inputs:Metadata* "
    "5:outputs:Metadata*",
    "Metadata": "1:name:string 2:datatype:string 3:shape:int64*",
    "ModelInferRequest": "1:model_name:string 2:model_version:string 3:id:string 4:parameters:Parameter* "
    "5:inputs:Tensor* 6:outputs:Requested* 7:raw_input_contents:bytes*",
    "ModelInferResponse": "1:model_name:string 2:model_version:string 3:id:string 4:parameters:Parameter* "
    "5:outputs:Tensor* 6:raw_output_contents:bytes*",
    "Tensor": "1:name:string 2:datatype:string 3:shape:int64* 4:parameters:Parameter* 5:contents:Contents",
    "Requested": "1:name:string 2:parameters:Parameter*",
    "Parameter": "1:key:string 2:value:Value",
    "Value": "1:bool_param:bool 2:int64_param:int64 3:string_param:string 4:double_param:double 5:uint64_param:uint64",
    "Contents": "1:bool_contents:bool* 2:int_contents:int32* 3:int64_contents:int64* 4:uint_contents:uint32* "
    "5:uint64_contents:uint64* 6:fp32_contents:float* 7:fp64_contents:double* 8:bytes_contents:bytes*",
    "ModelConfigRequest": "1:name:string 2:version:string",
    "ModelConfigResponse": "1:config:Config",
    "Config": "1:name:string 2:platform:string 4:max_batch_size:int32 5:input:ConfigInput* 6:output:ConfigOutput* "
    "17:backend:string",
    # data_type is an enumeration there, which travels as an int32
    "ConfigInput": "1:name:string 2:data_type:int32 4:dims:int64*",
    "ConfigOutput": "1:name:string 2:data_type:int32 3:dims:int64*",
    "RepositoryIndexRequest": "1:repository_name:string 2:ready:bool",
    "RepositoryIndexResponse": "1:models:ModelIndex*",
    "ModelIndex": "1:name:string 2:version:string 3:state:string 4:reason:string",
}
"""The fields of each message as `number:name:type`, repeated ones with a star."""

CONFIG_TYPES = {"TYPE_INT64": 9, "TYPE_FP32": 11, "TYPE_STRING": 13}
"""Numbers of the datatypes that a bundle uses, in a model configuration."""


@cache
def message_class(name: str) -> Any:
    """The class of a message, by its name in `FIELDS`."""
    found = message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{PACKAGE}.{name}"))
    # without HAProxy, Serve's own proxy hands requests to the replica as Python objects, and these have no module
    copyreg.pickle(found, lambda message: (_parse, (name, message.SerializeToString())))
    return found


def _parse(name: str, data: bytes) -> Any:
    return message_class(name).FromString(data)


@cache
def _pool() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="bigray_inference.proto", package=PACKAGE, syntax="proto3")
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field in fields.split():
            _add_field(message, *field.split(":"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _add_field(message: Any, number: str, name: str, kind: str) -> None:
    word = kind.removesuffix("*")
    proto = descriptor_pb2.FieldDescriptorProto
    field = message.field.add(name=name, number=int(number))
    field.label = proto.LABEL_REPEATED if kind.endswith("*") else proto.LABEL_OPTIONAL
    if word in FIELDS:
        field.type, field.type_name = proto.TYPE_MESSAGE, f".{PACKAGE}.{word}"
    else:
        field.type = getattr(proto, f"TYPE_{word.upper()}")
