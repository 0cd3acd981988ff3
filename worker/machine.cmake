# What a worker decides: pure, so it is linked without a device, a link or CAF.
add_library(sc_worker_core STATIC
  worker_machine.cpp worker_deputy.cpp deputy_machine.cpp peer_wire.cpp)
target_link_libraries(sc_worker_core PUBLIC sc_config sc_planning sc_coordinator_core
  PRIVATE nlohmann_json::nlohmann_json)
