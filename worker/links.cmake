# Links between the workers of one generation.

# Asio's body, compiled once; whoever uses Asio in this house links it and sees declarations only.
add_library(sc_asio STATIC asio_impl.cpp)
target_compile_definitions(sc_asio PUBLIC BOOST_ASIO_SEPARATE_COMPILATION)
target_link_libraries(sc_asio PUBLIC Boost::headers OpenSSL::SSL OpenSSL::Crypto Threads::Threads
                      PRIVATE house_sanitizers)
if(STAGECOACH_SANITIZE STREQUAL "thread")
  # Its fences are no news to the thread sanitizer, which follows the mutexes beside them, and GCC warns of each.
  target_compile_options(sc_asio PUBLIC -Wno-tsan)
endif()

add_library(sc_links STATIC link_memory.cpp link_frame.cpp link_shm.cpp connection_asio.cpp peer_line_asio.cpp
  link_upgrade_asio.cpp link_asio.cpp)
target_link_libraries(sc_links
  PUBLIC sc_config
  PRIVATE sc_log sc_asio sc_tls PkgConfig::XXHASH)

add_executable(test_links
  ${CMAKE_SOURCE_DIR}/tests/doctest_main.cpp
  ${CMAKE_SOURCE_DIR}/tests/link_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/link_frame_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/link_shm_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/link_asio_test.cpp
  ${CMAKE_SOURCE_DIR}/tests/peer_line_test.cpp)
target_link_libraries(test_links PRIVATE sc_links sc_log OpenSSL::Crypto doctest::doctest PkgConfig::XXHASH)
add_test(NAME links COMMAND test_links)

add_executable(fuzz_link_frame ${CMAKE_SOURCE_DIR}/tests/fuzz/link_frame_fuzz.cpp)
target_link_libraries(fuzz_link_frame PRIVATE sc_links PkgConfig::XXHASH)
add_test(NAME fuzz_link_frame COMMAND fuzz_link_frame)
