# What decides without computing: plans, schedules and the leaf tree. No kernels, so the coordinator
# links it without oneDNN.
add_library(sc_planning STATIC plan.cpp copies.cpp schedule.cpp leaf_tree.cpp virtual_time.cpp leaf_shares.cpp
  layer_shares.cpp)
target_link_libraries(sc_planning PUBLIC sc_config sc_tensor_names PRIVATE PkgConfig::XXHASH)

add_executable(test_planning
  ${CMAKE_SOURCE_DIR}/tests/doctest_main.cpp
  ${CMAKE_SOURCE_DIR}/tests/copies_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/leaves_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/layer_shares_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/leaf_shares_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/leaf_tree_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/schedule_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/plan_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/virtual_time_test.cpp)
target_link_libraries(test_planning PRIVATE sc_planning doctest::doctest)
add_test(NAME planning COMMAND test_planning)
