# The coordinator as a process: API, storage threads and the actor that holds the machines.
# Apart, since a deputy writes manifests too.
add_library(sc_checkpoint_keeper STATIC checkpoint_keeper.cpp)
target_link_libraries(sc_checkpoint_keeper PUBLIC sc_config sc_storage sc_coordinator_core)

add_library(sc_coordinator STATIC
  api.cpp api_page.cpp coordinator_actor.cpp metrics_text.cpp run_history.cpp
  state_folder.cpp store_writer.cpp submission.cpp vote_log.cpp)
target_link_libraries(sc_coordinator
  PUBLIC sc_config sc_storage
  PRIVATE sc_log sc_checkpoint_keeper sc_machines sc_wire sc_planning sc_gateway CAF::core prometheus-cpp::core
    nlohmann_json::nlohmann_json Threads::Threads)

add_executable(test_coordinator_process
  ${CMAKE_SOURCE_DIR}/tests/doctest_main.cpp
  ${CMAKE_SOURCE_DIR}/tests/api_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/coordinator_actor_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/store_writer_test.cpp)
target_link_libraries(test_coordinator_process PRIVATE sc_coordinator sc_http_client
  nlohmann_json::nlohmann_json doctest::doctest Threads::Threads)
add_test(NAME coordinator_process COMMAND test_coordinator_process)
