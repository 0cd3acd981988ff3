add_library(sc_trainer STATIC vote.cpp replica_reduction.cpp step_runner.cpp device_probe.cpp feed_schedule.cpp feeder.cpp fault_injection.cpp window_run.cpp)
target_link_libraries(sc_trainer PUBLIC sc_config sc_tensor_names sc_model sc_planning sc_links PRIVATE sc_log sc_storage PkgConfig::XXHASH)

add_executable(test_worker_feed ${CMAKE_SOURCE_DIR}/tests/doctest_main.cpp ${CMAKE_SOURCE_DIR}/tests/feeder_test.cpp)
target_link_libraries(test_worker_feed PRIVATE sc_trainer doctest::doctest)
add_test(NAME worker_feed COMMAND test_worker_feed)

add_executable(test_reduction ${CMAKE_SOURCE_DIR}/tests/doctest_main.cpp ${CMAKE_SOURCE_DIR}/tests/replica_reduction_test.cpp)
target_link_libraries(test_reduction PRIVATE sc_trainer doctest::doctest)
add_test(NAME reduction COMMAND test_reduction)
