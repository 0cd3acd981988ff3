# Links between the workers of one generation.
add_library(sc_links STATIC link_memory.cpp)
target_link_libraries(sc_links
  PUBLIC sc_config
  PRIVATE sc_log OpenSSL::SSL OpenSSL::Crypto Boost::headers PkgConfig::XXHASH Threads::Threads)

add_executable(test_links
  ${CMAKE_SOURCE_DIR}/tests/doctest_main.cpp
  ${CMAKE_SOURCE_DIR}/tests/link_memory_test.cpp)
target_link_libraries(test_links PRIVATE sc_links doctest::doctest Threads::Threads)
add_test(NAME links COMMAND test_links)
