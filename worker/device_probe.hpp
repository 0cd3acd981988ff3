// The device class: a fact about this machine's arithmetic, not a name that somebody gave it.
#pragma once

#include <string>

namespace stagecoach {

/// Name of the arithmetic of this machine: backend name and the hash of a fixed probe (one
/// microbatch through each kind of unit). Workers of one job must share it (DESIGN 4 "Device
/// class").
std::string device_class(int threads, const std::string& isa);

}  // namespace stagecoach
