# What computes: parameters, a stage's forward and backward, the optimizer's scalars, data order, text.
add_library(sc_model STATIC parameters.cpp stage.cpp shadow.cpp optimizer.cpp data_order.cpp generate.cpp)
target_link_libraries(sc_model PUBLIC sc_kernels sc_config sc_planning PRIVATE PkgConfig::XXHASH)

add_executable(test_model
  ${CMAKE_SOURCE_DIR}/tests/doctest_main.cpp
  ${CMAKE_SOURCE_DIR}/tests/parameters_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/stage_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/optimizer_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/data_order_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/generate_test.cpp)
target_link_libraries(test_model PRIVATE sc_model doctest::doctest)
add_test(NAME model COMMAND test_model)
