# What decides: the machines of the jobs and of the cluster, their messages and records. No CAF, socket or disk.
add_library(sc_tensor_names STATIC ${CMAKE_SOURCE_DIR}/model/tensor_names.cpp)
target_link_libraries(sc_tensor_names PUBLIC sc_config)

# Apart, since workers speak it too (wire.hpp and messages.hpp are the two headers they may enter).
add_library(sc_wire STATIC wire.cpp records.cpp)
target_link_libraries(sc_wire PUBLIC sc_config sc_planning nlohmann_json::nlohmann_json)

add_library(sc_coordinator_core STATIC
  decision.cpp job_adoption.cpp job_machine.cpp job_generation.cpp job_watch.cpp job_feed.cpp job_saves.cpp job_audit.cpp
  cluster_patrol.cpp job_compete.cpp job_balance.cpp trace_desk.cpp cluster_machine.cpp cluster_compete.cpp)
target_link_libraries(sc_coordinator_core PUBLIC sc_wire sc_planning sc_tensor_names)
add_library(sc_machines ALIAS sc_coordinator_core)

add_executable(test_coordinator
  ${CMAKE_SOURCE_DIR}/tests/doctest_main.cpp
  ${CMAKE_SOURCE_DIR}/tests/wire_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/job_machine_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/job_watch_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/job_audit_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/job_feed_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/cluster_machine_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/compete_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/job_balance_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/worker_machine_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/deputy_machine_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/job_adoption_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/tensor_names_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/trace_desk_test.cpp)
target_link_libraries(test_coordinator PRIVATE sc_coordinator_core sc_worker_core sc_model
  doctest::doctest)
add_test(NAME coordinator COMMAND test_coordinator)

add_executable(fuzz_wire ${CMAKE_SOURCE_DIR}/tests/fuzz/wire_fuzz.cpp)
target_link_libraries(fuzz_wire PRIVATE sc_wire)
add_test(NAME fuzz_wire COMMAND fuzz_wire)
