add_library(sc_trainer STATIC vote.cpp step_runner.cpp device_probe.cpp fault_injection.cpp window_run.cpp)
target_link_libraries(sc_trainer PUBLIC sc_config sc_tensor_names sc_model sc_planning sc_links PRIVATE sc_log sc_storage PkgConfig::XXHASH)
